"""How much of a run should be quantization-aware, at a fixed number of steps.

    qjax run configs/training/share.toml

A small Llama trains from scratch for `steps` in all. An arm of share 0.2 trains in float at a constant rate and turns
quantization on for the last fifth, which is the cooldown; with `fused = false` the float part has a cooldown of its
own. The quantized part warms up again, and Adam's moments start anew with it. Share 0 is rounded at the end, share 1
never saw a float weight.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qjax import rundir
from qjax.errors import UserError
from qjax.evaluate.intervals import half_interval
from qjax.models.model import Model
from qjax.pipeline.memory import quantize_params
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

Programs = dict[tuple[Arm, int], Program]  # what all seeds share: (arm, steps) -> its program
TWO_BITS = Arm("qat", Grid("int2_g64_mid_mse"), Optimizer(4e-3))


@dataclasses.dataclass(frozen=True)
class Config:
    """The runs."""

    arm: Arm = TWO_BITS
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)
    fused: tuple[bool, ...] = (True, False)
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
    """Every share on every seed."""
    if config.arm.grid.init:
        raise UserError("arm.grid.init: this experiment starts from float weights")
    texts, heldout = texts_of(config.text, config.heldout, config.characters)
    tokenizer = tokenizer_in(out, texts, config.vocab)
    corpus = corpus_in(out, tokenizer, texts, heldout, config.context, config.heldout_windows)
    runs, programs = [], {}
    for seed in config.seeds:
        model = fresh_model(config, tokenizer.get_vocab_size(), seed)
        for share in config.shares:
            for fused in config.fused:
                if share in (0.0, 1.0) and fused != config.fused[0]:
                    continue  # one phase: there is nothing to fuse
                loss = one(config, corpus, model, seed, share, fused, programs, out)
                runs.append({"seed": seed, "share": share, "fused": fused, "loss": loss})
                rundir.log(out, runs[-1])
    table, rows = Table("share", "cooldown", "nats", "over share 0", "+-"), []
    zero = {r["seed"]: r["loss"] for r in runs if r["share"] == 0}
    for share, fused in dict.fromkeys((r["share"], r["fused"]) for r in runs):
        losses = {r["seed"]: r["loss"] for r in runs if (r["share"], r["fused"]) == (share, fused)}
        row = {"share": share, "fused": fused, "loss": statistics.fmean(losses.values())}
        if zero:
            pairs = [losses[s] - zero[s] for s in losses]
            row["difference"] = statistics.fmean(pairs)
            row["half_interval"] = half_interval(pairs)
        rows.append(row)
        cells = ("fused" if fused else "its own", f"{row['loss']:.4f}", f"{row.get('difference', 0.0):+.4f}",
                 f"{row.get('half_interval') or 0.0:.4f}")  # fmt: skip
        table.add_row(f"{share:g}", *cells)
    Console(highlight=False).print(table)
    return {"rows": rows, "runs": runs}


def one(
    config: Config, corpus: Corpus, model: Model, seed: int, share: float, fused: bool, programs: Programs, out: Path
) -> float:
    """The held-out loss of the quantized model."""
    windows = Batches(corpus.tokens, config.context, config.batch, seed)
    late = round(share * config.steps)
    early = config.steps - late
    folder = out / f"seed{seed}-share{share:g}-{'fused' if fused else 'own'}"

    def phase(arm: Arm, model: Model, first: int, run: Run) -> tuple[Model, float]:
        key = arm, run.steps
        if key not in programs:
            programs[key] = program(arm, model.config, run.steps)
        data = Data(lambda step: {"tokens": windows.batch_at(first + step)}, corpus.heldout)
        params, _, loss, _ = finetune(programs[key], start_state(programs[key], model.params), data, run)
        return dataclasses.replace(model, params=params), loss

    if early:
        own, shape = config.arm.optimizer, "constant" if fused and late else "cosine"
        arm = Arm("float", optimizer=Optimizer(own.rate, weight_decay=own.weight_decay, shape=shape))
        run = Run(folder / "float", early, early, early, early, identity=windows.identity)
        model, _ = phase(arm, model, 0, run)
    if not late:
        packed, _ = quantize_params(model.params, config.arm.grid.plan(model.config))
        return exported_loss(dataclasses.replace(model, params=packed), folder, corpus.heldout)
    model, loss = phase(
        config.arm, model, early, Run(folder / "qat", late, late, late, late, identity=windows.identity)
    )
    read_back(export(model, folder), loss, corpus.heldout, config.arm.activations)
    return loss
