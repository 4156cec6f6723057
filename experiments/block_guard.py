"""Whether a block's output should be guarded as a weight's is: how often it is worse although its weights are better.

    qjax run configs/block_guard.toml

The model is rounded twice on the same windows: by a recipe with feedback, each of whose weights is kept only where
held-out tokens like it better than the fit, and by the fit alone. On windows that neither saw each block i reads the
stream x behind the recipe's blocks before it, and

    e = mean over tokens of |block(x; W_hat) - y|^2 / |y|^2,        y = block(x_float; W)

is compared between the two. A guard would take the fit's block where e of one half of those windows is smaller; KL to
the float model on the other half says what that is worth.
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from qjax import rundir
from qjax.budget.forward import Params, Runs
from qjax.evaluate.perplexity import Windows
from qjax.io.checkpoint import load_float
from qjax.io.text import texts_at
from qjax.models import stdlib_text
from qjax.models.model import Model
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.report import Report
from qjax.pipeline.windows import calibration_text
from qjax.plan import mix


@dataclasses.dataclass(frozen=True)
class Config:
    """The model, the text and the two roundings."""

    model: str = "reference"
    mix: str = "Q3_K_M"
    recipe: str = "best_gguf"
    fit: str = "imatrix"
    calibration: tuple[Path, ...] = ()  # files and folders; none: modules of the standard library
    windows: int = 8  # of calibration
    unseen: int = 16  # windows that blocks are judged on
    context: int = 512
    seeds: tuple[int, ...] = (0, 1, 2)


def run(config: Config, out: Path) -> dict[str, Any]:
    """Fill `out` with metrics.jsonl; returns a row a block and seed, and one a seed of what a guard is worth."""
    model = load_float(config.model)
    plan = mix(config.mix, model.config, has_imatrix=True)
    rows: list[dict[str, Any]] = []
    worth: list[dict[str, Any]] = []
    for seed in config.seeds:
        count = config.windows + config.unseen
        given = texts_at(config.calibration) if config.calibration else stdlib_text.calibration_text(1_200_000, seed)
        text = calibration_text(model, given, context=config.context, limit=count, seed=seed)
        seen = dataclasses.replace(text, tokens=text.tokens[: config.windows], heldout=max(1, config.windows // 8))
        made = {how: quantize_model(model, plan, how, seen) for how in (config.recipe, config.fit)}
        best, report = made[config.recipe]
        params = {"floats": parts_of(model), "best": parts_of(best), "fit": parts_of(made[config.fit][0])}
        unseen = text.tokens[config.windows :]
        chosen, judged = (runs_on(model, unseen[half::2], params["floats"]) for half in (0, 1))
        for row in by_block(chosen, params):
            better = weights_better(report, f"layers_{row['block']}/")
            rows.append({"seed": seed, **row, "weights": better[1], "weights_better": better[0]})
            rundir.log(out, rows[-1])
        rose = [f"layers_{row['block']}" for row in rows if row["seed"] == seed and row["ratio"] > 1]
        guarded = {**params["best"], **{name: params["fit"][name] for name in rose}}
        kl = {who: float(kl_of(judged, p).mean()) for who, p in (("best", params["best"]), ("guarded", guarded))}
        worth.append({"seed": seed, "blocks": len(rose), "kl": kl["best"], "kl_guarded": kl["guarded"]})
        rundir.log(out, worth[-1])
    ratios = [row["ratio"] for row in rows]
    values = {"blocks": len(rows), "worse": sum(r > 1 for r in ratios), "median_ratio": statistics.median(ratios)}
    return {"rows": rows, "guards": worth, "values": values}


def parts_of(model: Model) -> Params:
    """Its parts in float32."""
    return {name: model.part(name) for name in model.params}


def runs_on(model: Model, tokens: np.ndarray, floats: Params) -> Runs:
    """The float model on some windows."""
    return Runs(model.config, Windows(tokens, tokens.shape[1] // 8, "unseen"), floats).with_baseline()


def by_block(runs: Runs, params: dict[str, Params]) -> list[dict[str, Any]]:
    """The output errors of each block behind the recipe's blocks: of the recipe, of the fit, of nothing but drift."""
    x_float, x = runs.first(params["floats"]), runs.first(params["best"])
    found = []
    for i in range(runs.config.layers):
        y = runs.block(i, params["floats"], x_float)
        made = {who: runs.block(i, p, x) for who, p in params.items()}
        e = {who: float(np.mean(np.sum((v - y) ** 2, -1) / np.sum(y**2, -1))) for who, v in made.items()}
        ratio = e["best"] / e["fit"]
        found.append({"block": i, "error": e["best"], "fit": e["fit"], "drift": e["floats"], "ratio": ratio})
        x_float, x = y, made["best"]
    return found


def kl_of(runs: Runs, params: Params) -> np.ndarray:
    """KL to the float model, of each window."""
    return runs.kl_behind(0, params, runs.first(params))


def weights_better(report: Report, prefix: str) -> tuple[int, int]:
    """How many weights of a block lose less on held-out tokens than their fits, and how many were looked at."""
    lines = [t.calibration for t in report.tensors if t.name.startswith(prefix) and t.calibration is not None]
    pairs = [(c.heldout_loss, c.first_heldout_loss) for c in lines]
    known = [(after, before) for after, before in pairs if after is not None and before is not None]
    return sum(after < before for after, before in known), len(known)
