"""Outliers of weights and inputs before and after scaling and rotation: one picture a layer, and its numbers.

    qjax run configs/outliers.toml

The reference model has few outliers of its own; `planted` channels behind each norm are made `factor` times as large
and the weights behind them as much smaller, which changes nothing the model computes (models/fuse.py) and is what large
models look like.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.calibrate import observe
from qjax.evaluate.outlier_plots import outlier_plot, outliers
from qjax.io.checkpoint import load
from qjax.models import stdlib_text
from qjax.models.fuse import fuse_scale
from qjax.models.graph import edges
from qjax.models.model import Model, forward
from qjax.pipeline.windows import calibration_text
from qjax.reparam import awq_scale, hadamard, smooth


@dataclasses.dataclass(frozen=True)
class Config:
    """What to look at."""

    model: str = "reference"
    weights: tuple[str, ...] = ("layers_0/attn/q/kernel", "layers_4/mlp/up/kernel", "layers_7/mlp/down/kernel")
    planted: tuple[int, ...] = (3, 70)  # channels behind every norm
    factor: float = 20.0  # 1: none planted
    windows: int = 8
    context: int = 128


def run(config: Config, out: Path) -> dict[str, Any]:
    """Write one PNG a weight; returns peaks and kurtoses."""
    model = planted(load(config.model), config)
    calibration = calibration_text(
        model, stdlib_text.calibration_text(200_000, 0), limit=config.windows, context=config.context
    )

    def apply(params: Any, tokens: Any) -> Any:
        return forward(model.config, params, tokens)

    seen = observe(apply, model.params, [jnp.asarray(calibration.tokens)], ("samples",))
    changes = {
        "as it is": (), "smooth(0.5)": (smooth(),), "awq_scale()": (awq_scale(),), "hadamard('in')": (hadamard("in"),),
        "smooth, then hadamard": (smooth(), hadamard("in")),
    }  # fmt: skip
    rows = []
    for path in config.weights:
        w: Any = model.params
        for key in path.split("/"):
            w = w[key]
        found = outliers(jnp.asarray(w, jnp.float32).T, jnp.asarray(seen[path].samples), changes)
        file = f"{path.replace('/', '-')}.png"
        (out / file).write_bytes(outlier_plot(found, path))
        for name, numbers in found.items():
            kept = {k: v for k, v in numbers.items() if not isinstance(v, np.ndarray)}
            rows.append({"weight": path, "change": name, **kept})
            print(f"{path} {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in kept.items()))
    return {"rows": rows}


def planted(model: Model, config: Config) -> Model:
    """The same function with outlier channels behind every norm."""
    params = model.params
    for edge in edges(model.config):
        if edge.is_norm and config.factor != 1:
            d = np.ones(edge.channels, np.float32)
            d[list(config.planted)] = 1 / config.factor
            params = fuse_scale(params, model.config, edge, d)
    return dataclasses.replace(model, params=params)
