"""Outliers by input channel, before and after changes of variables: the largest |W| and |x| of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.formats import format as get_format
from qjax.reparam import Reparam, Site, reparametrize
from qjax.stats import Stats
from qjax.typing import Array, Float

GROUPS = 16  # of channels, in a map of all layers


def outliers(
    w: Float[Array, "out n"],
    x: Float[Array, "k n"],
    changes: Mapping[str, tuple[Reparam, ...]],
    format: str = "int4_g32",
) -> dict[str, dict[str, Any]]:
    """What every change of variables makes of a layer's outliers.

    Args:
      w: the weight, rows (out, in).
      x: inputs.
      changes: title -> chain of reparametrizations; an empty chain is the layer as it is.
      format: the grid that searches look at.

    Returns: title -> {"w": the weight; "weights", "inputs": the largest absolute value of each channel, np.f32[n];
      "weight_peak", "input_peak": the largest channel over the median one; "weight_kurtosis", "input_kurtosis": of all
      values, 3 for a normal distribution}.
    """
    found = {}
    for title, chain in changes.items():
        H = jnp.matmul(x.T, x, precision="highest") / x.shape[0]
        size = jnp.abs(x)
        stats = Stats(H=H, absmean=jnp.mean(size, axis=0), absmax=jnp.max(size, axis=0))
        site, applied, _ = reparametrize(chain, Site(w, stats, get_format(format)))
        y = x
        for one in applied:
            y = one.input(y)
        tops = [np.asarray(jnp.max(jnp.abs(a), axis=0)) for a in (site.w, y)]
        found[title] = {
            "w": np.asarray(site.w), "weights": tops[0], "inputs": tops[1],
            "weight_peak": _peak(tops[0]), "input_peak": _peak(tops[1]),
            "weight_kurtosis": _kurtosis(np.asarray(site.w)), "input_kurtosis": _kurtosis(np.asarray(y)),
        }  # fmt: skip
    return found


def peaks(top: np.ndarray, groups: int = GROUPS) -> list[float]:
    """The largest of each group of neighbouring channels, over the median channel.

    Args:
      top: the largest absolute value of each channel.
      groups: how many there are, at most.
    """
    middle = max(float(np.median(top)), 1e-30)
    return [float(f"{part.max() / middle:.4g}") for part in np.array_split(top, min(groups, top.size))]


def _peak(top: np.ndarray) -> float:
    return float(top.max() / max(float(np.median(top)), 1e-30))


def _kurtosis(a: np.ndarray) -> float:
    a = np.float64(a) - np.float64(a).mean()
    return float(np.mean(a**4) / max(np.mean(a * a) ** 2, 1e-300))
