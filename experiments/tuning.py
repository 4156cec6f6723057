"""Models tuned behind their rounding, against the same models untuned: KL to the float one on a text neither has seen.

    qjax run configs/tuning.toml

An entry of `recipes` is a recipe with a format; embedding and head become `outside` to nearest. Every entry is judged
as it is rounded, tuned end to end, and, where `blocks` names it, with its blocks tuned as the walk comes by; where
`within` names it, also behind each input of a block, with what is still to be rounded of it (QuIP#'s order). `ratio` is
the KL over that of the untuned model on the same windows, with half its 95 % interval over them:

    r = sum a / sum b         +- t sd(a - r b) / (sqrt(n) mean b)         a, b: KL of a window, tuned and not

A killed run goes on with the entries that it had not finished.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from qjax import recipes, rundir
from qjax.evaluate.divergence import Baseline
from qjax.evaluate.intervals import half_interval, ratio_of_means
from qjax.evaluate.judge import baseline_of, kl_by_token
from qjax.io.checkpoint import load_float
from qjax.models import stdlib_text
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.report import Report
from qjax.pipeline.windows import Calibration, calibration_text
from qjax.plan import Plan
from qjax.training.tuning.blocks import TuneBlocks
from qjax.training.tuning.descent import Tuning
from qjax.training.tuning.end_to_end import tune


@dataclasses.dataclass(frozen=True)
class Config:
    """The recipes, the texts and the steps."""

    model: str = "reference"
    recipes: tuple[str, ...] = ("gptq:uint2_g64", "best_gguf:Q2_K")
    blocks: tuple[str, ...] = ("gptq:uint2_g64",)  # of `recipes`, those whose blocks are tuned too
    within: tuple[str, ...] = ()  # of `recipes`, those that are tuned within their blocks too
    outside: str = "Q8_0"
    windows: int = 128  # of calibration text
    context: int = 256  # tokens a window, of both texts
    judged: int = 64  # windows
    tuning: Tuning = dataclasses.field(default_factory=Tuning)
    block_steps: int = 50
    seed: int = 0


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns a row for each entry and way."""
    model = load_float(config.model)
    text = stdlib_text.calibration_text(1_200_000, config.seed)
    calibration = calibration_text(model, text, limit=config.windows, context=config.context, seed=config.seed)
    baseline = baseline_of(model, stdlib_text.heldout_text(), context=config.context, limit=config.judged)
    done = {(r["recipe"], r["way"]): r for r in rundir.logged(out / "metrics.jsonl")}
    for line in config.recipes:
        ways = ["rounded", "end to end", *["blocks"] * (line in config.blocks), *["within"] * (line in config.within)]
        if all((line, way) in done for way in ways):
            continue
        for row in rows_of(config, line, ways, model, calibration, baseline):
            done[line, row["way"]] = row
            rundir.log(out, row)
            print(f"{line} {row['way']}: KL {row['kl']:.5f}, {row['ratio']:.3f} of untuned", file=sys.stderr)
    return {"rows": list(done.values())}


def rows_of(
    config: Config, line: str, ways: list[str], model: Model, calibration: Calibration, baseline: Baseline
) -> list[dict[str, Any]]:
    """One entry in all ways."""
    recipe = recipes.recipe(line)
    assert recipe.format is not None
    plan = Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": f"rtn:{config.outside}"}})
    rounded, _ = quantize_model(model, plan, recipe, calibration)
    clock = time.perf_counter()
    tuned, found = tune(model, rounded, calibration, config.tuning)
    seconds = time.perf_counter() - clock
    said = {"steps": found.steps, "kept": found.kept, "heldout": found.loss, "first_heldout": found.first_loss}
    made = {"rounded": (rounded, {}), "end to end": (tuned, said | {"seconds": seconds})}
    for way in ways[2:]:
        tuner = TuneBlocks(dataclasses.replace(config.tuning, steps=config.block_steps), within=way == "within")
        clock = time.perf_counter()
        blocks, report = quantize_model(model, plan, recipe, calibration, tune=tuner)
        made[way] = blocks, {"block_loss": last_block_loss(report), "seconds": time.perf_counter() - clock}
    kl = {way: np.asarray(kl_by_token(made[way][0], baseline), np.float64).mean(axis=1) for way in ways}
    rows = []
    for way in ways:
        a = kl[way]
        ratio, half = ratio_of_means(a, kl["rounded"])
        whole = {
            "kl": float(a.mean()),
            "kl_half_interval": half_interval(list(a)),
            "ratio": ratio,
            "ratio_half_width": half,
        }
        rows.append({"recipe": line, "format": recipe.format.name, "way": way, **whole, **made[way][1]})
    return rows


def last_block_loss(report: Report) -> float:
    """The mean over blocks of the held-out distance of their outputs, as the last line of each says it."""
    notes = {t.name.split("/")[0]: t.calibration.note for t in report.tensors if t.calibration is not None}
    ends = [re.findall(r"held out \S+ -> ([^\s;]+)", note or "") for note in notes.values()]
    return float(np.mean([float(found[-1]) for found in ends if found]))
