"""Weights before and after, counted in bins: by their values, and by their places on the grids of their own blocks."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.evaluate.sizes import as_float, named_leaves
from qjax.tensor import QTensor, dequantize, is_qtensor
from qjax.typing import Array

Bins = list[dict[str, float]]

BINS = 64  # at most: a histogram is a few rows of a result file
WEIGHTS = 1 << 22  # whose grids are looked at: every level of every block


def weight_histogram(before: Array | np.ndarray, after: Array | np.ndarray) -> Bins:
    """Shares of weights in bins, before and after a rounding, a rotation, or training.

    Args:
      before, after: floats; what lies beyond 99.95 % of `before` counts as the last bin's.

    Returns: {"weight": the middle of a bin, "before", "after": the shares of weights in it}.
    """
    a, b = np.asarray(before, np.float32).ravel(), np.asarray(after, np.float32).ravel()
    reach = float(np.quantile(np.abs(a), 0.9995)) or 1.0
    return _bins("weight", np.linspace(-reach, reach, BINS), a, b)  # an odd count: zero is the middle of one


def grid_histogram(w: Array | np.ndarray, q: QTensor) -> Bins:
    """Weights on their blocks' own grids, and what became of them: the grid's levels.

    A position is (w - first level) / (last level - first level) with each weight's own levels, so blocks of any scale
    and offset fall onto one another.

    Args:
      w: the weights before.
      q: the same, packed.

    Returns: {"position": the middle of a bin, "before", "after": the shares of weights in it}; nothing for vector
      formats, grids of more than 64 levels, weights behind a change of variables, and more than 4 million of them.
    """
    if q.size > WEIGHTS or q.applied:
        return []
    before, after = (
        np.asarray(jnp.moveaxis(jnp.asarray(v), q.axis, -1), np.float32).ravel() for v in (w, dequantize(q))
    )
    place, levels = grid_positions(q, before)
    now, _ = grid_positions(q, after)
    if place is None or levels is None or now is None:
        return []
    count = len(levels)
    each = max(1, BINS // count - (BINS // count % 2 == 0))  # odd: an even grid's levels are the middles of bins
    edge = 0.5 / max(count - 1, 1)
    return _bins("position", np.linspace(-edge, 1 + edge, count * each + 1), place, now)


def middle_histograms(before: Any, after: Any, ending: str = "mlp/up/kernel") -> dict[str, list[dict[str, Any]]]:
    """Both histograms of one weight of a model: of those whose path ends so, the one in the middle.

    Args:
      before: the float tree.
      after: the same weights rounded or trained, packed or not.
      ending: of the paths.

    Returns: {"weights", "grid": rows that say in "of" whose they are}; {} where no path ends so.
    """
    old, new = named_leaves(before), named_leaves(after)
    paths = [path for path in new if path.endswith(ending)]
    if not paths:
        return {}
    path = paths[len(paths) // 2]
    w, q = old[path], new[path]
    bins = {
        "weights": weight_histogram(as_float(w), as_float(q)),
        "grid": grid_histogram(w, q) if is_qtensor(q) else [],
    }
    of = f"{path} in {q.format.name}" if is_qtensor(q) else path
    return {key: [{"of": of, **row} for row in rows] for key, rows in bins.items()}


def grid_positions(q: QTensor, values: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Each weight's and each level's place on its block's grid; None for vector formats and fine grids."""
    if q.format.tile != (1, 1):
        return None, None
    scales, codes = q.format.unpack(q.leaves)
    used = np.unique(np.asarray(codes))
    if not 1 < len(used) <= BINS:
        return None, None
    levels = np.stack([np.asarray(q.format.decode(scales, jnp.full_like(codes, c))).ravel() for c in used])
    # A negative scale turns a block's grid around, so levels are ordered by code, as the code farthest from 0 points.
    turned = np.sign(levels[np.argmax(np.abs(levels).max(axis=1))])
    order = np.argsort(np.median(levels * turned[None, :], axis=1))
    first, last = levels[order[0]], levels[order[-1]]
    if np.median(last - first) < 0:
        first, last = last, first
    live = last != first  # blocks of one value have no grid
    if not live.any():
        return None, None
    width = (last - first)[live]
    relative = np.median((levels[:, live] - first[live]) / width, axis=1)
    return (values[live] - first[live]) / width, np.sort(relative)


def _bins(key: str, edges: np.ndarray, before: np.ndarray, after: np.ndarray) -> Bins:
    shares = [np.histogram(np.clip(v, edges[0], edges[-1]), edges)[0] / max(v.size, 1) for v in (before, after)]
    middles = (edges[:-1] + edges[1:]) / 2
    digits = 3 - math.floor(math.log10(edges[1] - edges[0]))
    return [
        {key: round(float(m), digits) + 0.0, "before": round(float(b), 6), "after": round(float(a), 6)}
        for m, b, a in zip(middles, *shares, strict=True)
    ]
