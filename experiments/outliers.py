"""Outliers of weights and inputs before and after scaling and rotation: numbers of some layers, a map of all.

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
from qjax.evaluate.histograms import weight_histogram
from qjax.evaluate.outliers import outliers, peaks
from qjax.io.checkpoint import load
from qjax.models import stdlib_text
from qjax.models.fuse import fuse_scale
from qjax.models.graph import edges
from qjax.models.model import Model, forward
from qjax.pipeline.windows import calibration_text
from qjax.reparam import Reparam, awq_scale, hadamard, smooth


@dataclasses.dataclass(frozen=True)
class Config:
    """What to look at."""

    model: str = "reference"
    weights: tuple[str, ...] = ("layers_0/attn/q/kernel", "layers_4/mlp/up/kernel", "layers_7/mlp/down/kernel")
    mapped: str = "attn/q/kernel"  # the kind of weight whose inputs are mapped in all layers; "" for none
    planted: tuple[int, ...] = (3, 70)  # channels behind every norm
    factor: float = 20.0  # 1: none planted
    windows: int = 8
    context: int = 128


def run(config: Config, out: Path) -> dict[str, Any]:
    """Returns peaks and kurtoses, histograms of weights before and after the rotation, and maps of inputs."""
    model = planted(load(config.model), config)
    calibration = calibration_text(
        model, stdlib_text.calibration_text(200_000, 0), limit=config.windows, context=config.context
    )

    def apply(params: Any, tokens: Any) -> Any:
        return forward(model.config, params, tokens)

    seen = observe(apply, model.params, [jnp.asarray(calibration.tokens)], ("samples",))
    changes: dict[str, tuple[Reparam, ...]] = {
        "as it is": (), "smooth(0.5)": (smooth(),), "awq_scale()": (awq_scale(),), "hadamard('in')": (hadamard("in"),),
        "smooth, then hadamard": (smooth(), hadamard("in")),
    }  # fmt: skip
    rotated = "hadamard('in')"
    rows, histograms, maps = [], [], []

    def look(path: str, changes: dict[str, tuple[Reparam, ...]]) -> dict[str, dict[str, Any]]:
        w: Any = model.params
        for key in path.split("/"):
            w = w[key]
        return outliers(jnp.asarray(w, jnp.float32).T, jnp.asarray(seen[path].samples), changes)

    for path in config.weights:
        found = look(path, changes)
        bins = weight_histogram(found["as it is"]["w"], found[rotated]["w"])
        histograms += [{"of": f"{path}, {rotated}", **line} for line in bins]
        for name, numbers in found.items():
            kept = {k: v for k, v in numbers.items() if not isinstance(v, np.ndarray)}
            rows.append({"weight": path, "change": name, **kept})
            print(f"{path} {name}: " + ", ".join(f"{k} {v:.1f}" for k, v in kept.items()))
    for layer in range(model.config.layers) if config.mapped else ():
        found = look(f"layers_{layer}/{config.mapped}", {name: changes[name] for name in ("as it is", rotated)})
        for name, numbers in found.items():
            groups = enumerate(peaks(numbers["inputs"]))
            maps += [{"of": name, "layer": layer, "group": group, "peak": peak} for group, peak in groups]
    return {"rows": rows, "weights": histograms, "outliers": maps}


def planted(model: Model, config: Config) -> Model:
    """The same function with outlier channels behind every norm."""
    params = model.params
    for edge in edges(model.config):
        if edge.is_norm and config.factor != 1:
            d = np.ones(edge.channels, np.float32)
            d[list(config.planted)] = 1 / config.factor
            params = fuse_scale(params, model.config, edge, d)
    return dataclasses.replace(model, params=params)
