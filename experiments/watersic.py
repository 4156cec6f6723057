"""Integers of a rate, not of a size: WaterSIC's spacings against equal ones on a model.

    qjax run configs/watersic.toml

Rates are those of codes that would have to be entropy-coded, and decoded again before a product: nothing here is a
file, and no row is to stand beside one of a stored format. All weights of all blocks are rounded in the second moments
of the float model's inputs; embedding, norms and head stay float32.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax import rundir
from qjax.calibrate import observe
from qjax.evaluate.judge import baseline_of, judge
from qjax.io.checkpoint import load_float
from qjax.models import stdlib_text
from qjax.models.model import Model, forward
from qjax.pipeline.windows import calibration_text
from qjax.rounding.curvature import two_sided_loss
from qjax.rounding.watersic import EntropyCoded, watersic
from qjax.stats import Stats


@dataclasses.dataclass(frozen=True)
class Config:
    """The rates, the model and the texts."""

    model: str = "reference"
    bits: tuple[float, ...] = (2.0, 2.5, 3.0, 4.0)
    spacings: tuple[Literal["water", "equal"], ...] = ("water", "equal")
    windows: int = 128  # of calibration
    context: int = 128
    judged: int = 32  # windows of the model's whole context


def run(config: Config, out: Path) -> dict[str, Any]:
    """Returns a row for each rate and spacing: what it costs and what it does to the predictions."""
    model = load_float(config.model)
    text = stdlib_text.calibration_text(400_000, 0)
    tokens = calibration_text(model, text, limit=config.windows, context=config.context, heldout=0.0).tokens
    batches = [jnp.asarray(tokens[i : i + 16]) for i in range(0, len(tokens), 16)]
    seen = observe(partial(_apply, model), model.params, batches, ("H",))
    baseline = baseline_of(model, stdlib_text.heldout_text(), limit=config.judged)
    rows: list[dict[str, Any]] = []
    for bits in config.bits:
        for spacing in config.spacings:
            rounded, cost = coded_model(model, seen, bits, spacing)
            found = judge(rounded, baseline=baseline).divergence
            assert found is not None
            row = {"spacing": spacing, **cost, "kl": found.kl_mean, "kl_se_clustered": found.kl_mean_se_clustered}
            rows.append(row | {"same_top_percent": found.same_top_percent})
            rundir.log(out, rows[-1])
            print(rows[-1], file=sys.stderr)
    return {"entropy_coded": rows}


def coded_model(model: Model, seen: Mapping[str, Stats], bits: float, spacing: str) -> tuple[Model, dict[str, float]]:
    """The model with every weight of its blocks as integers of a rate, dense again; the mean cost of a weight."""
    sums = dict.fromkeys(("rate_bits", "entropy_bits", "relative_loss", "weights"), 0.0)

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("layers_") or np.ndim(leaf) != 2:
            return leaf
        w, H = jnp.asarray(leaf, jnp.float32).T, jnp.asarray(seen[name].H)
        made = _coded(w, H, bits, spacing)
        loss = two_sided_loss(w - made.w_hat, H) / two_sided_loss(w, H)
        for key, value in zip(sums, (made.rate, made.entropy, loss, 1.0), strict=True):
            sums[key] += float(value) * w.size
        return made.w_hat.T

    params = jax.tree_util.tree_map_with_path(one, model.params)
    weights = sums.pop("weights")
    return dataclasses.replace(model, params=params), {k: v / weights for k, v in sums.items()}


@partial(jax.jit, static_argnames=("bits", "spacing"))
def _coded(w: Any, H: Any, bits: float, spacing: Literal["water", "equal"]) -> EntropyCoded:
    return watersic(w, H, bits, spacing)


def _apply(model: Model, params: Any, tokens: Any) -> Any:
    return forward(model.config, params, tokens)
