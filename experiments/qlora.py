"""QLoRA and its kin: adapters on a frozen packed base, and what is left of them in the model that is exported.

    qjax run configs/training/qlora.toml

    method      base                          forward                              merge
    lora        float                         W + scale A B                        the sum
    qlora       nearest in `format`           W_hat + scale A B                    requantized: rounded again
    loftq       LoftQ's Q, its A and B        W_hat + scale A B                    requantized
    qalora      nearest, float zeros          adapter constant inside a group      exact: into the zeros
    loraqat     float                         fake_quant(W + scale A B)            exact: is the forward

Both losses are reported: of the model with its adapters on the side, and of the merged model. Only the second is a file
of the stated size. Every method starts from the same model and sees the same batches.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from qjax import rundir
from qjax.evaluate.intervals import half_interval
from qjax.io.checkpoint import load
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.pipeline.memory import quantize_params
from qjax.plan import Plan
from qjax.training.adapters.loftq import loftq_params
from qjax.training.adapters.lora import apply_adapted, init_adapters, lora_weight, map_adapted
from qjax.training.adapters.merging import merge_fake_quantized, merge_requantized
from qjax.training.adapters.qalora import apply_pooled, init_pooled, merge_zeros
from qjax.training.decoder.export import exported_loss
from qjax.training.decoder.finetune import heldout_loss, mean_loss
from qjax.training.decoder.program import forward
from qjax.training.grid.fake_quant import fake_quant
from qjax.training.losses.objectives import cross_entropy
from qjax.training.optim.groups import Group, labels, partitioned, rates
from qjax.training.optim.schedules import warmup_cosine
from qjax.training.run.corpus import corpus_for, texts_of
from qjax.training.run.data import Windows
from qjax.training.run.loop import Loop, train
from qjax.training.run.state import init_state, make_step

Method = Literal["lora", "qlora", "loftq", "qalora", "loraqat"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method on one format."""

    method: Method
    format: str = "NF4_dq"
    rank: int = 16
    alpha: float = 16.0
    rate: float = 2e-4
    rounds: int = 5  # loftq's


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
    start = heldout_loss(forward(model.config), model.params, corpus.heldout)
    runs = []
    for seed in config.seeds:
        windows = Windows(corpus.tokens, config.context, config.batch, seed)
        for entry in config.entries:
            clock = time.perf_counter()
            name = f"{entry.method}-{entry.format}-r{entry.rank}-a{entry.alpha:g}-{entry.rate:g}-seed{seed}"
            row = one(config, entry, model, windows, corpus, seed, out / name)
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
    return {"start": start, "rows": rows, "runs": runs}


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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What an entry compiles; all its seeds share it."""

    beside: Any  # ({"adapters", "base"}, tokens) -> logits
    groups: tuple[Group, ...]
    schedule: Any
    optimizer: Any
    step: Any


@lru_cache(maxsize=16)
def compiled(entry: Entry, config: DecoderConfig, steps: int) -> Compiled:
    """The forward and the step of an entry."""
    apply = forward(config)

    def beside(parts: Any, tokens: Any) -> Any:
        adapters, base = parts["adapters"], parts["base"]
        if entry.method == "qalora":
            return apply_pooled(apply, base, adapters, tokens)
        if entry.method == "loraqat":
            w = map_adapted(lambda path, w, a: fake_quant(lora_weight(w, a), entry.format, axis=-2), base, adapters)
            return apply(w, tokens)
        return apply_adapted(apply, base, adapters, tokens)

    def loss(params: Any, kept: Any, batch: Any, key: Any) -> Any:
        del key
        tokens = batch["tokens"]
        logits = beside({"adapters": params["adapters"], "base": kept["base"]}, tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:]), {}

    groups = (Group("adapters", "adapters/*", entry.rate, 0.0, 1.0),)
    schedule = warmup_cosine(1.0, steps, round(0.05 * steps))
    optimizer = partitioned(groups, schedule)
    step = make_step(loss, optimizer, labels=lambda p: labels(p, groups))
    return Compiled(beside, groups, schedule, optimizer, step)


def one(
    config: Config, entry: Entry, model: Model, windows: Windows, corpus: Any, seed: int, out: Path
) -> dict[str, Any]:
    """Train and merge one entry."""
    base, adapters = started(entry, model, seed)
    made = compiled(entry, model.config, config.steps)

    def judged(adapters: Any) -> float:
        return mean_loss(made.beside, {"adapters": adapters, "base": base}, corpus.heldout)

    before = judged(adapters)
    every = config.log_every * max(1, config.steps // (2 * config.log_every))
    state, _ = train(
        init_state({"adapters": adapters}, made.optimizer, {"base": base}), made.step,
        lambda s: {"tokens": jnp.asarray(windows.batch_at(s))}, out, Loop(config.steps, config.log_every, every, every),
        identity={**windows.identity, "entry": dataclasses.asdict(entry), "model": config.model, "steps": config.steps},
        describe=lambda at: {f"rate/{k}": float(v) for k, v in rates(made.groups, made.schedule, at).items()},
        name=entry.method,
    )  # fmt: skip
    trained = state.params["adapters"]
    if entry.method == "qalora":
        merged = merge_zeros(base, trained)
    elif entry.method == "loraqat":
        merged = merge_fake_quantized(base, trained, entry.format)
    else:
        merged = merge_requantized(base, trained)
    loss = exported_loss(dataclasses.replace(model, params=merged.params), out, corpus.heldout)
    return {
        "method": entry.method, "format": "float" if entry.method == "lora" else entry.format, "base": before,
        "adapted": judged(trained), "merged": loss,
        "semantics": "sum" if entry.method == "lora" else merged.semantics,
    }  # fmt: skip


def started(entry: Entry, model: Model, seed: int) -> tuple[Any, Any]:
    """The frozen base and the adapters at the start."""
    plan = Plan.from_dict({"rules": {"layers_*": entry.format, "*": "keep"}})
    key = jax.random.key(seed)
    options: dict[str, Any] = {"rank": entry.rank, "alpha": entry.alpha, "key": key}
    if entry.method in ("lora", "loraqat"):
        return model.params, init_adapters(model.params, **options)
    if entry.method == "loftq":
        return loftq_params(model.params, plan, rank=entry.rank, rounds=entry.rounds)
    base, _ = quantize_params(model.params, plan)
    return base, init_pooled(base, **options) if entry.method == "qalora" else init_adapters(base, **options)
