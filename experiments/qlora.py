"""QLoRA and its kin: adapters on a frozen packed base, and what is left of them in the model that is exported.

    qjax run configs/training/qlora.toml

Methods are those of `adapters.adapted`: lora, qlora, loftq, qalora, loraqat. `arms` train the weights or the scales
themselves through their quantization. A loss with a teacher has the float model as it was. `ptq` has files that nobody
trained, recipes that look at the same windows as training does, all of them or `calibration_windows`: the control of
every trained file of the same format.

Both losses are reported: of the model with its adapters on the side, and of the merged model. Only the second is a file
of the stated size. Every method starts from the same model and sees the same batches.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.intervals import half_interval
from qjax.io.checkpoint import load_float
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.windows import Calibration, calibration_of
from qjax.plan import Plan, decoder_weights
from qjax.training.adapters.adapted import Adapted
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.export import export, exported_loss, read_back
from qjax.training.decoder.finetune import finetune, heldout_loss, mean_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Compute, Program, Teacher, program, start_state
from qjax.training.losses.objectives import Losses
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import Corpus, corpus_for, texts_of
from qjax.training.run.curve import curve
from qjax.training.run.data import Batches
from qjax.training.run.devices import data_on
from qjax.training.run.loop import Run
from qjax.training.run.state import init_state

LIKELIHOOD = Losses()


@dataclasses.dataclass(frozen=True)
class Entry(Adapted):
    """One method on one format, at one rate."""

    rate: float = 2e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """What is adapted to what."""

    model: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    entries: tuple[Entry, ...] = (Entry("lora"), Entry("qlora"))
    losses: Losses = LIKELIHOOD  # of the entries; those of an arm are its own
    arms: tuple[Arm, ...] = ()  # whose weights or scales train through their quantization
    ptq: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> a recipe with its format
    calibration_windows: int = 0  # of recipes, the first that training sees; 0: all that it sees
    text: Path | None = None  # UTF-8, to adapt to; none: the standard library
    heldout: Path | None = None  # UTF-8, to be judged by
    characters: int = 0  # of each text that are read; 0: all
    context: int = 256
    batch: int = 8
    steps: int = 100
    seeds: tuple[int, ...] = (0,)  # of the adapters and of the order of the batches
    log_every: int = 10
    eval_windows: int = 64


def run(config: Config, out: Path) -> dict[str, Any]:
    """A row of every method on every seed, trained in a folder of its own; a killed run continues."""
    model = load_float(config.model)
    lines = {name: line_of(name, line, model) for name, line in config.ptq.items()}
    texts = texts_of(config.text, config.heldout, config.characters)
    corpus = corpus_for(model, config.model, texts, out, config.context, config.eval_windows)
    start = heldout_loss(Forward(model.config), model.params, corpus.heldout)
    entries = [(entry, compiled(entry, model.config, config)) for entry in config.entries]
    arms = [(arm, of_arm(arm, model.config, config)) for arm in config.arms]
    before = {r["name"]: r for r in rundir.logged(out / "metrics.jsonl")}
    runs: list[dict[str, Any]] = []

    def row_of(label: str, name: str, seed: int, make: Callable[[Path], dict[str, Any]]) -> None:
        """The row of a name: that of an earlier, interrupted run, or a new one with the time that making it took."""
        if name not in before:
            clock = time.perf_counter()
            row = {"label": label, **make(out / name), "name": name, "seed": seed, "start": start}
            before[name] = row | {"seconds": time.perf_counter() - clock}
            rundir.log(out, before[name])
            print(f"{name}: {row['merged']:.4f} nats, {before[name]['seconds']:.0f} s", file=sys.stderr)
        runs.append(before[name])

    for seed in config.seeds:
        windows = Batches(corpus.tokens, config.context, config.batch, seed)
        for entry, trained in entries:
            name = f"{entry.method}-{entry.format}-r{entry.rank}-a{entry.alpha:g}-{entry.rate:g}-seed{seed}"
            label = f"{entry.method} {'float' if entry.method == 'lora' else entry.format}"
            row_of(label, name, seed, partial(one, config, entry, trained, model, windows, corpus, seed))
        for arm, trained in arms:
            row_of(arm.name, f"{arm.name}-seed{seed}", seed, partial(qat, config, arm, trained, model, windows, corpus))
        for label, line in lines.items():
            row_of(label, f"ptq {label}-seed{seed}", seed, partial(untrained, config, line, model, windows, corpus))
    table = Table("method", "format", "seed", "rounded base", "with adapters", "merged", "merge")
    for r in runs:
        losses = ("" if r.get(k) is None else f"{r[k]:.4f}" for k in ("base", "adapted", "merged"))
        table.add_row(r["label"], r["format"], str(r["seed"]), *losses, r["semantics"])
    Console(highlight=False).print(table)
    print(f"the float model before: {start:.4f} nats per token, held out")
    rows = summary(runs)
    for r in rows:
        if r.get("half_interval") is not None:
            print(
                f"{r['name']}: {r['difference']:+.4f} +- {r['half_interval']:.4f} nats to {r['against']}, with adapters"
            )
        if "gain_over_ptq" in r:
            print(f"{r['name']}: {r['gain_over_ptq']:+.4f} nats gained over the best file that nobody trained")
    return {"start": start, "rows": rows, "runs": runs, "curve": curves(runs, out)}


def curves(runs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The entries' logs over steps, means over seeds."""
    logs: dict[str, list[Any]] = {}
    for run in (run for run in runs if run["method"] != "ptq"):
        name = run["name"].removesuffix(f"-seed{run['seed']}")
        logs.setdefault(name, []).append(rundir.logged(out / run["name"] / "metrics.jsonl"))
    return curve(logs)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds; paired, the losses with adapters less those of the first entry, and what merged files gain over
    the best of their format that nobody trained."""
    by_label = {label: [r for r in runs if r["label"] == label] for label in dict.fromkeys(r["label"] for r in runs)}
    first = next((own for own in by_label.values() if own[0].get("adapted") is not None), [])
    rows = []
    for label, own in by_label.items():
        row = {"name": label, "format": own[0]["format"]}
        row |= {k: statistics.fmean(r[k] for r in own) for k in ("base", "adapted", "merged") if own[0].get(k)}
        if "adapted" in row:
            pairs = [a["adapted"] - b["adapted"] for a, b in zip(own, first, strict=True)]
            row |= {"against": first[0]["method"], "difference": statistics.fmean(pairs)}
            row["half_interval"] = half_interval(pairs)
        rivals = [r for r in runs if r["method"] == "ptq" and r["format"] == row["format"]]
        if rivals and own[0]["method"] != "ptq":
            best = {r["seed"]: min(q["merged"] for q in rivals if q["seed"] == r["seed"]) for r in rivals}
            gains = [best[r["seed"]] - r["merged"] for r in own]
            row |= {"gain_over_ptq": statistics.fmean(gains), "gain_half_interval": half_interval(gains)}
        rows.append(row)
    return rows


def compiled(entry: Entry, decoder: DecoderConfig, config: Config) -> Program:
    """What all seeds of an entry share."""
    arm = Arm(entry.method, optimizer=Optimizer(entry.rate), losses=config.losses)
    teacher = Teacher(decoder if config.losses.taught else None)
    return program(arm, decoder, config.steps, through=entry, teacher=teacher, compute=Compute(mixed=False))


def of_arm(arm: Arm, decoder: DecoderConfig, config: Config) -> Program:
    """What all seeds of an arm share."""
    if not arm.grid.format:
        raise UserError(f'arm {arm.name!r}: name what the weights become, as in grid.format = "int2_g64_mid_mse"')
    arm.grid.plan(decoder).assign(decoder_weights(decoder))
    teacher = Teacher(decoder if arm.losses.taught else None)
    return program(arm, decoder, config.steps, teacher=teacher, compute=Compute(mixed=False))


def run_of(config: Config, name: str, windows: Batches, facts: dict[str, Any], folder: Path) -> Run:
    """How far training goes: logged along the way, judged and saved in the middle and at the end."""
    every = config.log_every * max(1, config.steps // (2 * config.log_every))
    identity = {**windows.identity, **facts, "model": config.model}
    return Run(folder, config.steps, config.log_every, every, every, name=name, identity=identity)


def one(
    config: Config, entry: Entry, trained: Program, model: Model, windows: Batches, corpus: Corpus, seed: int, out: Path
) -> dict[str, Any]:
    """Train and merge one entry."""
    params, constants = entry.start(model.params, jax.random.key(seed))
    if config.losses.taught:
        constants = {**constants, "teacher": model.params}
    state, beside = init_state(params, trained.optimizer, constants), entry.forward(Forward(model.config))

    def judged(params: Any, constants: Any) -> float:
        return mean_loss(beside, entry(params, constants), corpus.heldout)

    before = judged(state.params, state.constants)
    run = run_of(config, entry.method, windows, {"entry": dataclasses.asdict(entry)}, out)
    params, _, loss, state = finetune(trained, state, data_on(windows, corpus.heldout), run)
    read_back(export(dataclasses.replace(model, params=params), out), loss, corpus.heldout)
    return {
        "method": entry.method, "format": "float" if entry.method == "lora" else entry.format, "base": before,
        "adapted": judged(state.params, state.constants), "merged": loss, "semantics": entry.semantics,
    }  # fmt: skip


def qat(
    config: Config, arm: Arm, trained: Program, model: Model, windows: Batches, corpus: Corpus, out: Path
) -> dict[str, Any]:
    """Train one arm; its base is what it starts from, to nearest or by its recipe."""
    recipe = arm.grid.init or "rtn"
    rounded = quantize_model(model, arm.grid.plan(model.config), recipe, seen_by(config, model, windows))[0].params
    base = heldout_loss(trained.judge, rounded, corpus.heldout)
    state = start_state(trained, model.params, rounded=rounded if arm.grid.init else None, teacher=model.params)
    run = run_of(config, arm.name, windows, {}, out)
    params, _, loss, _ = finetune(trained, state, data_on(windows, corpus.heldout), run)
    read_back(export(dataclasses.replace(model, params=params), out), loss, corpus.heldout, arm.activations)
    return {"method": "qat", "format": arm.grid.format, "base": base, "merged": loss, "semantics": "trained"}


def line_of(name: str, line: str, model: Model) -> recipes.Recipe:
    """A recipe of `ptq`; what the model cannot take is refused before any work."""
    recipe = recipes.recipe(line)
    if recipe.format is None:
        raise UserError(f"ptq {name!r}: {line!r} names no format; write {line}:uint2_g64")
    plan_of(recipe).assign(decoder_weights(model.config))
    return recipe


def plan_of(recipe: recipes.Recipe) -> Plan:
    """The blocks' matrices, as adapters have them; the rest stays."""
    assert recipe.format is not None
    return Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": "keep"}})


def untrained(
    config: Config, recipe: recipes.Recipe, model: Model, windows: Batches, corpus: Corpus, out: Path
) -> dict[str, Any]:
    """Round by a recipe, and train nothing."""
    assert recipe.format is not None
    q, _ = quantize_model(model, plan_of(recipe), recipe, seen_by(config, model, windows))
    loss = exported_loss(q, out, corpus.heldout)
    return {"method": "ptq", "format": recipe.format.name, "merged": loss, "semantics": "untrained"}


def seen_by(config: Config, model: Model, windows: Batches) -> Calibration:
    """The first windows that training sees, or all of them."""
    count = config.calibration_windows or config.steps * config.batch
    steps = range(-(-count // config.batch))
    rows = np.concatenate([windows.batch_at(step)[:, :-1] for step in steps])[:count]
    return calibration_of(model.config.context, rows.reshape(-1), context=rows.shape[1], heldout=0.0)
