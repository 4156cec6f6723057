"""QLoRA and its kin: adapters on a frozen packed base, and what is left of them in the model that is exported.

    qjax run configs/training/qlora.toml

Methods are those of `adapters.adapted`: lora, qlora, loftq, qalora, loraqat.

Both losses are reported: of the model with its adapters on the side, and of the merged model. Only the second is a file
of the stated size. Every method starts from the same model and sees the same batches.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from qjax import rundir
from qjax.evaluate.intervals import half_interval
from qjax.io.checkpoint import load
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.training.adapters.adapted import Adapted
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.export import export, read_back
from qjax.training.decoder.finetune import finetune, heldout_loss, mean_loss
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.program import Compute, Program, program
from qjax.training.optim.optimizer import Optimizer
from qjax.training.run.corpus import Corpus, corpus_for, texts_of
from qjax.training.run.curve import curve
from qjax.training.run.data import Batches
from qjax.training.run.devices import data_on
from qjax.training.run.loop import Run
from qjax.training.run.state import init_state


@dataclasses.dataclass(frozen=True)
class Entry(Adapted):
    """One method on one format, at one rate."""

    rate: float = 2e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """What is adapted to what."""

    model: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    entries: tuple[Entry, ...] = (Entry("lora"), Entry("qlora"))
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
    """Train every entry on every seed, each in a folder of its own; a killed run continues."""
    model = load(config.model)
    texts = texts_of(config.text, config.heldout, config.characters)
    corpus = corpus_for(model, config.model, texts, out, config.context, config.eval_windows)
    start = heldout_loss(Forward(model.config), model.params, corpus.heldout)
    programs = [compiled(entry, model.config, config.steps) for entry in config.entries]
    runs = []
    for seed in config.seeds:
        windows = Batches(corpus.tokens, config.context, config.batch, seed)
        for entry, trained in zip(config.entries, programs, strict=True):
            clock = time.perf_counter()
            name = f"{entry.method}-{entry.format}-r{entry.rank}-a{entry.alpha:g}-{entry.rate:g}-seed{seed}"
            row = one(config, entry, trained, model, windows, corpus, seed, out / name)
            row |= {"name": name, "seed": seed, "start": start, "seconds": time.perf_counter() - clock}
            runs.append(row)
            rundir.log(out, row)
    table = Table("method", "format", "seed", "rounded base", "with adapters", "merged", "merge")
    for r in runs:
        losses = (f"{r[k]:.4f}" for k in ("base", "adapted", "merged"))
        table.add_row(r["method"], r["format"], str(r["seed"]), *losses, r["semantics"])
    Console(highlight=False).print(table)
    print(f"the float model before: {start:.4f} nats per token, held out")
    rows = summary(config, runs)
    for r in rows:
        if r["half_interval"] is not None:
            print(
                f"{r['name']}: {r['difference']:+.4f} +- {r['half_interval']:.4f} nats to {r['against']}, with adapters"
            )
    return {"start": start, "rows": rows, "runs": runs, "curve": curves(runs, out)}


def curves(runs: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The entries' logs over steps, means over seeds."""
    logs: dict[str, list[Any]] = {}
    for run in runs:
        name = run["name"].removesuffix(f"-seed{run['seed']}")
        logs.setdefault(name, []).append(rundir.logged(out / run["name"] / "metrics.jsonl"))
    return curve(logs)


def summary(config: Config, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and paired differences of the losses with adapters to the config's first entry."""
    by_entry = [runs[i :: len(config.entries)] for i in range(len(config.entries))]
    rows = []
    for own in by_entry:
        pairs = [a["adapted"] - b["adapted"] for a, b in zip(own, by_entry[0], strict=True)]
        rows.append(
            {
                "name": f"{own[0]['method']} {own[0]['format']}", "against": by_entry[0][0]["method"],
                **{k: statistics.fmean(r[k] for r in own) for k in ("base", "adapted", "merged")},
                "difference": statistics.fmean(pairs), "half_interval": half_interval(pairs),
            }
        )  # fmt: skip
    return rows


def compiled(entry: Entry, config: DecoderConfig, steps: int) -> Program:
    """What all seeds of an entry share."""
    arm = Arm(entry.method, optimizer=Optimizer(entry.rate))
    return program(arm, config, steps, through=entry, compute=Compute(mixed=False))


def one(
    config: Config, entry: Entry, trained: Program, model: Model, windows: Batches, corpus: Corpus, seed: int, out: Path
) -> dict[str, Any]:
    """Train and merge one entry."""
    params, constants = entry.start(model.params, jax.random.key(seed))
    state, beside = init_state(params, trained.optimizer, constants), entry.forward(Forward(model.config))

    def judged(params: Any, constants: Any) -> float:
        return mean_loss(beside, entry(params, constants), corpus.heldout)

    before = judged(state.params, state.constants)
    every = config.log_every * max(1, config.steps // (2 * config.log_every))
    run = Run(
        out, config.steps, config.log_every, every, every, name=entry.method,
        identity={**windows.identity, "entry": dataclasses.asdict(entry), "model": config.model},
    )  # fmt: skip
    params, _, loss, state = finetune(trained, state, data_on(windows, corpus.heldout), run)
    read_back(export(dataclasses.replace(model, params=params), out), loss, corpus.heldout)
    return {
        "method": entry.method, "format": "float" if entry.method == "lora" else entry.format, "base": before,
        "adapted": judged(state.params, state.constants), "merged": loss, "semantics": entry.semantics,
    }  # fmt: skip
