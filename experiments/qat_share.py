"""How much of a run should be quantization-aware, at a fixed number of steps.

    qjax run configs/training/share.toml

A small Llama trains from scratch for `steps` in all. An arm of share 0.2 trains in float at a constant rate and turns
quantization on for the last fifth, which is the cooldown; with `fused = false` the float part has a cooldown of its
own. The quantized part warms up again, and Adam's moments start anew with it. Share 0 is rounded at the end, share 1
never saw a float weight.

Share 0 has a schedule of its own, a cosine. A control of share 0.2 has that of share 0.2, and goes on in float where
that is quantized: a constant rate, a new warm-up and a cooldown. It is rounded by each of `roundings`. What an arm
gains over the best of them is what quantization-aware training is worth, and not what its schedule is.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.intervals import half_interval
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.memory import quantize_params
from qjax.pipeline.windows import Calibration, calibration_of
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.export import export, exported_loss, read_back
from qjax.training.decoder.finetune import finetune
from qjax.training.decoder.fresh import fresh_model
from qjax.training.decoder.program import Program, program, start_state
from qjax.training.decoder.quantization import Grid
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import Corpus, corpus_in, texts_of, tokenizer_in
from qjax.training.run.data import Batches
from qjax.training.run.devices import Data
from qjax.training.run.loop import Run

CONTROL = "float as "  # how the names of controls begin
Programs = dict[tuple[Arm, int], Program]  # what all seeds share: (arm, steps) -> its program
TWO_BITS = Arm("qat", Grid("int2_g64_mid_mse"), Optimizer(4e-3))


@dataclasses.dataclass(frozen=True)
class Config:
    """The runs."""

    arm: Arm = TWO_BITS
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
    fused: tuple[bool, ...] = (True, False)
    controls: tuple[float, ...] = (0.2,)  # shares whose schedule a control has; the first is the one of the table
    roundings: tuple[str, ...] = ("rtn", "nearest('h') >> ldlq('act') >> refit(2, 2)")  # of the controls
    calibration_windows: int = 128  # of the roundings, the first that training sees
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    steps: int = 600
    batch: int = 16
    context: int = 64
    vocab: int = 512
    dim: int = 64
    hidden: int = 192
    layers: int = 3
    heads: int = 2
    kv_heads: int = 1
    heldout_windows: int = 256
    text: Path | None = None  # UTF-8, to train on; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by
    characters: int = 0  # of each text that are read; 0: all


def run(config: Config, out: Path) -> dict[str, Any]:
    """Every share and every control on every seed; an interrupted run keeps its rows."""
    check(config)
    texts, heldout = texts_of(config.text, config.heldout, config.characters)
    tokenizer = tokenizer_in(out, texts, config.vocab)
    corpus = corpus_in(out, tokenizer, texts, heldout, config.context, config.heldout_windows)
    done = {(r["seed"], r.get("name")): r for r in rundir.logged(out / "metrics.jsonl")}
    programs: Programs = {}
    for seed in config.seeds:
        model = fresh_model(config, tokenizer.get_vocab_size(), seed)
        for share in config.shares:
            for fused in config.fused:
                if share in (0.0, 1.0) and fused != config.fused[0]:
                    continue  # one phase: there is nothing to fuse
                name = f"share {share:g}" + ("" if fused or share in (0.0, 1.0) else ", its own cooldown")
                if (seed, name) not in done:
                    loss = one(config, corpus, model, seed, share, fused, programs, out)
                    done[seed, name] = {"seed": seed, "name": name, "share": share, "fused": fused, "loss": loss}
                    rundir.log(out, done[seed, name])
        for share in config.controls:
            names = {f"{CONTROL}{share:g}: {rounding}": rounding for rounding in config.roundings}
            if all((seed, name) in done for name in names):
                continue
            for name, loss in control(config, corpus, model, seed, share, names, programs, out).items():
                done[seed, name] = {"seed": seed, "name": name, "share": 0.0, "fused": True, "loss": loss}
                rundir.log(out, done[seed, name])
    runs = list(done.values())
    rows = summary(runs, config)
    table = Table("arm", "nats", "over share 0", "+-", "over the best control", "+-")
    for r in rows:
        keys = ("loss", "difference", "half_interval", "over_control", "over_control_half_interval")
        table.add_row(r["name"], *("" if r.get(key) is None else f"{r[key]:.4f}" for key in keys))
    Console(highlight=False).print(table)
    return {"rows": rows, "runs": runs}


def check(config: Config) -> None:
    """What a config can be wrong in, before any work."""
    if config.arm.grid.init:
        raise UserError("arm.grid.init: this experiment starts from float weights")
    for share in config.controls:
        if not 0 < share < 1:
            raise UserError(f"controls: a share between 0 and 1, whose schedule has two parts; got {share}")
    if config.controls:
        cooldown_arm(config)
    if config.controls and not config.roundings:
        raise UserError('roundings: controls are rounded by some recipe, as in roundings = ["rtn"]')
    for rounding in config.roundings:
        if recipes.recipe(rounding).format is not None:
            raise UserError(f"roundings: {rounding!r} names a format; that of arm.grid is meant")


def summary(runs: list[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Means over seeds, and paired differences to share 0 and to the first control as its best recipe rounds it."""
    names = dict.fromkeys(r["name"] for r in runs)
    loss = {name: {r["seed"]: r["loss"] for r in runs if r["name"] == name} for name in names}
    mean = {name: statistics.fmean(losses.values()) for name, losses in loss.items()}
    of_first = [n for n in names if config.controls and n.startswith(f"{CONTROL}{config.controls[0]:g}: ")]
    best = min(of_first, key=lambda n: mean[n], default=None)
    rows = []
    for name, losses in loss.items():
        row = {k: r[k] for r in runs if r["name"] == name for k in ("name", "share", "fused")} | {"loss": mean[name]}
        for rival, key, half in (("share 0", "difference", "half_interval"),
                                 (best, "over_control", "over_control_half_interval")):  # fmt: skip
            if rival in loss:
                pairs = [losses[s] - loss[rival][s] for s in losses]
                row |= {key: statistics.fmean(pairs), half: half_interval(pairs)}
        rows.append(row)
    return rows


def phase(
    config: Config, corpus: Corpus, model: Model, seed: int, arm: Arm, first: int, steps: int, programs: Programs,
    folder: Path,
) -> tuple[Model, float]:  # fmt: skip
    """Train for a part of the steps, from the batch `first`; the model and its held-out loss."""
    windows = Batches(corpus.tokens, config.context, config.batch, seed)
    if (arm, steps) not in programs:
        programs[arm, steps] = program(arm, model.config, steps)
    trained = programs[arm, steps]
    data = Data(lambda step: {"tokens": windows.batch_at(first + step)}, corpus.heldout)
    run = Run(folder, steps, steps, steps, steps, identity=windows.identity)
    params, _, loss, _ = finetune(trained, start_state(trained, model.params), data, run)
    return dataclasses.replace(model, params=params), loss


def one(
    config: Config, corpus: Corpus, model: Model, seed: int, share: float, fused: bool, programs: Programs, out: Path
) -> float:
    """The held-out loss of the quantized model."""
    late = round(share * config.steps)
    early = config.steps - late
    folder = out / f"seed{seed}-share{share:g}-{'fused' if fused else 'own'}"
    if early:
        arm = float_arm(config, "constant" if fused and late else "cosine")
        model, _ = phase(config, corpus, model, seed, arm, 0, early, programs, folder / "float")
    if not late:
        packed, _ = quantize_params(model.params, config.arm.grid.plan(model.config))
        return exported_loss(dataclasses.replace(model, params=packed), folder, corpus.heldout)
    model, loss = phase(config, corpus, model, seed, config.arm, early, late, programs, folder / "qat")
    read_back(export(model, folder), loss, corpus.heldout, config.arm.activations)
    return loss


def control(
    config: Config, corpus: Corpus, model: Model, seed: int, share: float, names: dict[str, str], programs: Programs,
    out: Path,
) -> dict[str, float]:  # fmt: skip
    """The held-out losses of a float model with the schedule of a share, as each recipe rounds it: {name: loss}."""
    late = round(share * config.steps)
    early = config.steps - late
    folder = out / f"seed{seed}-control{share:g}"
    cooled = cooldown_arm(config)
    model, _ = phase(config, corpus, model, seed, float_arm(config, "constant"), 0, early, programs, folder / "float")
    model, _ = phase(config, corpus, model, seed, cooled, early, late, programs, folder / "cooldown")
    plan, seen = config.arm.grid.plan(model.config), calibration(config, corpus, model, seed)
    return {
        name: exported_loss(quantize_model(model, plan, rounding, seen)[0], folder / f"rounded{n}", corpus.heldout)
        for n, (name, rounding) in enumerate(names.items())
    }


def float_arm(config: Config, shape: Any) -> Arm:
    """The float part of every arm."""
    own = config.arm.optimizer
    return Arm("float", optimizer=Optimizer(own.rate, weight_decay=own.weight_decay, shape=shape))


def cooldown_arm(config: Config) -> Arm:
    """The arm without its quantization."""
    return Arm("cooldown", optimizer=config.arm.optimizer, losses=config.arm.losses)


def calibration(config: Config, corpus: Corpus, model: Model, seed: int) -> Calibration:
    """The first windows that training sees."""
    windows = Batches(corpus.tokens, config.context, config.batch, seed)
    steps = range(-(-config.calibration_windows // config.batch))
    rows = np.concatenate([windows.batch_at(step)[:, :-1] for step in steps])[: config.calibration_windows]
    return calibration_of(model.config.context, rows.reshape(-1), context=rows.shape[1])
