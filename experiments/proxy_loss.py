"""Chains of roundings on weights of a model, in the second moments of its own inputs: tr(E H E^T) seen and held out.

    qjax run configs/neighbours.toml

Every chain is put beside the first, on the same weight and statistics. Loss is of the layer, not of the model.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax import recipes, rundir
from qjax.calibrate import observe
from qjax.io.checkpoint import load
from qjax.models import stdlib_text
from qjax.models.model import forward
from qjax.pipeline.rounded import round_leaf
from qjax.pipeline.windows import calibration_text


@dataclasses.dataclass(frozen=True)
class Config:
    """The weights, the text and the chains."""

    model: str = "reference"
    weights: tuple[str, ...] = ("layers_0/attn/q/kernel", "layers_4/mlp/up/kernel", "layers_7/mlp/down/kernel")
    formats: tuple[str, ...] = ("Q2_K", "Q3_K", "NVFP4", "MXFP4")
    chains: tuple[str, ...] = ("nearest('h') >> ldlq() >> refit(2, 2)",)  # the first is what the others are shares of
    windows: int = 128
    context: int = 128
    heldout: float = 0.25


def run(config: Config, out: Path) -> dict[str, Any]:
    """Returns a row for each weight, format and chain, and the means over weights."""
    model = load(config.model)
    text = stdlib_text.calibration_text(400_000, 0)
    calibration = calibration_text(model, text, limit=config.windows, context=config.context, heldout=config.heldout)

    def apply(params: Any, tokens: Any) -> Any:
        return forward(model.config, params, tokens)

    used, held = np.split(calibration.tokens, [calibration.used])
    seen, unseen = (
        observe(apply, model.params, [jnp.asarray(t[i : i + 16]) for i in range(0, len(t), 16)], ("H",))
        for t in (used, held)
    )
    rows: list[dict[str, Any]] = []
    for path in config.weights:
        w: Any = model.params
        for key in path.split("/"):
            w = w[key]
        for format in config.formats:
            for chain in config.chains:
                made = recipes.recipe(chain).on(format)
                assert made.format is not None
                q, line = round_leaf(path, w, -2, made.format, made, seen[path], unseen[path])
                losses = {"loss": line.loss, "heldout_loss": line.heldout_loss}
                rows.append({"weight": path, "format": format, "chain": chain, "bits": q.bits_per_weight, **losses})
                rundir.log(out, rows[-1])
                print(f"{path} {format} {chain}: {line.loss:.6f}, held out {line.heldout_loss:.6f}", file=sys.stderr)
    return {"rows": rows, "summary": summary(rows, config)}


def summary(rows: Sequence[dict[str, Any]], config: Config) -> list[dict[str, Any]]:
    """Geometric means over weights of each chain's loss as a share of the first chain's."""

    def of(format: str, chain: str, key: str) -> list[float]:
        return [r[key] for r in rows if (r["format"], r["chain"]) == (format, chain)]

    def share(format: str, chain: str, key: str) -> float:
        pairs = zip(of(format, chain, key), of(format, config.chains[0], key), strict=True)
        return statistics.geometric_mean(a / b for a, b in pairs)

    return [
        {"format": f, "chain": c, "share": share(f, c, "loss"), "heldout_share": share(f, c, "heldout_loss")}
        for f in config.formats
        for c in config.chains
    ]
