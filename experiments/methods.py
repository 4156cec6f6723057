"""The named methods on one model at one width: what each does to the predictions, what it stores, how long it takes.

    qjax run configs/methods/4bit.toml

An entry of `methods` is a recipe with a format: a name (gptq:uint4_g128) or a line (NF4 >> nearest() >> ldlq()). It
rounds the matrices of the blocks; embedding and head become `outside`, the same for all, to nearest. Every entry runs
once for each calibration text, and the table gives the mean over them with its 95 % interval (Student's t); entries
that look at no text run once. Two methods whose intervals overlap are a tie.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qjax import recipes, rundir
from qjax.errors import UserError
from qjax.evaluate.intervals import half_interval
from qjax.evaluate.judge import baseline_of, judge
from qjax.io.checkpoint import load_float
from qjax.io.text import read_text
from qjax.models import stdlib_text
from qjax.models.model import Model
from qjax.pipeline.calibrated import Calibration, calibration_text, quantize_model, survey_model
from qjax.plan import Plan, decoder_weights
from qjax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Config:
    """The contest."""

    model: str = "reference"  # Hugging Face directory, .gguf, llama2.c .bin or built-in name
    methods: tuple[str, ...] = ("rtn:uint4_g128", "gptq:uint4_g128")
    outside: str = "Q8_0"  # the format of embedding and head; "keep" leaves them as they are
    text: Path | None = None  # judged, UTF-8; none: the held-out modules of Python's standard library
    tokens: int = 16_384  # judged, in whole windows
    context: int = 512  # tokens a window
    calibration: Path | None = None  # UTF-8; none: draws of the standard library's other modules
    calibration_windows: int = 32  # at most; an eighth is held out
    seeds: tuple[int, ...] = (0, 1, 2)  # calibration texts


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns every run and the table."""
    model = load_float(config.model)
    entries = {name: entry(name) for name in config.methods}
    plans = {name: plan_of(recipe, config.outside) for name, recipe in entries.items()}
    for plan in plans.values():  # what does not fit fails before any work
        plan.assign(decoder_weights(model.config))
    text = stdlib_text.heldout_text() if config.text is None else read_text(config.text)
    context = min(config.context, model.config.context)
    baseline = baseline_of(model, text, context=context, limit=max(1, config.tokens // context))
    runs: list[dict[str, Any]] = []
    for seed in config.seeds:
        calibration = calibration_of(config, model, seed)
        seen = survey_model(model, calibration) if any(r.sensitive for r in entries.values()) else None
        for name, recipe in entries.items():
            if seed != config.seeds[0] and not recipe.requires:
                continue
            clock = time.perf_counter()
            quantized, report = quantize_model(model, plans[name], recipe, calibration, seen=seen)
            seconds = time.perf_counter() - clock
            judged = judge(quantized, baseline=baseline, name=name, encode_seconds=seconds)
            inside = [t for t in report.tensors if t.name.startswith("layers_") and not t.kept]
            bits = 8 * sum(t.nbytes for t in inside) / sum(math.prod(t.shape) for t in inside)
            row = {"method": name, "recipe": str(recipe), "seed": seed, "layer_bits": bits, **judged.to_json()}
            runs.append(row)
            rundir.log(out, row)
            print(f"seed {seed} {name}: KL {row['kl_mean']:.5f}, {bits:.3f} bits, {seconds:.1f} s", file=sys.stderr)
    rows = [summary(name, [r for r in runs if r["method"] == name]) for name in entries]
    rows.sort(key=lambda row: -row["kl"])
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table(rows))
    return {"rows": rows, "runs": runs}


def entry(name: str) -> Recipe:
    """The recipe of an entry, which names its format."""
    recipe = recipes.recipe(name)
    if recipe.format is None:
        raise UserError(f"methods: {name!r} names no format; write {name}:uint4_g128")
    return recipe


def plan_of(recipe: Recipe, outside: str) -> Plan:
    """Blocks by the recipe, the rest to nearest."""
    rest: Any = outside if outside == "keep" else f"rtn:{outside}"
    assert recipe.format is not None
    return Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": rest}})


def calibration_of(config: Config, model: Model, seed: int) -> Calibration:
    """The windows of one seed."""
    text = (
        stdlib_text.calibration_text(1_200_000, seed) if config.calibration is None else read_text(config.calibration)
    )
    return calibration_text(model, text, limit=config.calibration_windows, seed=seed, context=config.context)


def summary(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the calibration texts, and half the 95 % interval of the KL."""

    def mean(key: str) -> float:
        return statistics.fmean(r[key] for r in runs)

    kl = [r["kl_mean"] for r in runs]
    return {
        "method": name, "texts": len(runs), "kl": mean("kl_mean"), "kl_half_interval": half_interval(kl),
        "kl_se_judged": mean("kl_mean_se"), "perplexity": mean("perplexity"),
        "same_top_percent": mean("same_top_percent"), "layer_bits": mean("layer_bits"),
        "whole_bits": mean("whole_bits"), "seconds": mean("encode_seconds"),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """For `rich.print`: the worst first."""
    made = Table()
    for column in ("method", "KL", "+-", "perplexity", "same top, %", "bits in layers", "bits in all", "seconds"):
        made.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for r in rows:
        half = "" if r["kl_half_interval"] is None else f"{r['kl_half_interval']:.5f}"
        made.add_row(
            r["method"], f"{r['kl']:.5f}", half, f"{r['perplexity']:.3f}", f"{r['same_top_percent']:.1f}",
            f"{r['layer_bits']:.3f}", f"{r['whole_bits']:.3f}", f"{r['seconds']:.1f}",
        )  # fmt: skip
    return made
