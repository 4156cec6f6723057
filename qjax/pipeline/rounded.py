"""One weight through a recipe: rows, statistics and a grid in; packed blocks and a report line out."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.pipeline.encode import broken_weights
from qjax.pipeline.report import CalibrationReport
from qjax.recipes import Recipe
from qjax.rounding import Rounded, check_chain, nearest, round_weight
from qjax.stats import Stats
from qjax.tensor import QTensor, dequantize
from qjax.typing import Array


def round_leaf(
    name: str, leaf: Any, axis: int, format: Format, recipe: Recipe, stats: Stats, heldout: Stats | None = None
) -> tuple[QTensor, CalibrationReport]:
    """Round one matrix, or a stack of them with a stack of statistics.

    Args:
      name: for messages.
      leaf: floats [*b, ...]; its last two axes are a matrix, contracted along `axis`.
      axis: -1 or -2.
      format: the grid.
      recipe: its roundings; its own format is not looked at.
      stats: of the leaf's input, stacked like the leaf, or one for the whole stack.
      heldout: statistics of other tokens, to report the loss in.

    Raises:
      UserError: NaN or Inf in the weight, a missing statistic or one of another size, an H that no damping makes
        definite.
    """
    clock = time.perf_counter()
    rows = jnp.moveaxis(jnp.asarray(leaf, jnp.float32), axis, -1)
    bad = int(jnp.sum(~jnp.isfinite(rows)))
    if bad:
        raise broken_weights(name, bad)
    n = rows.shape[-1]
    for kind in (*stats.kinds,):
        if kind != "samples" and getattr(stats, kind).shape[-1] != n:
            size = getattr(stats, kind).shape[-1]
            raise UserError(f"{name}: the statistic {kind!r} is of {size} inputs, the weight has {n}")
    check_chain(recipe.roundings, format, stats, name)
    stats = stats.only(tuple(recipe.requires))
    made = _stacked(rows, format, recipe, stats, None if heldout is None else heldout.H)
    damping = float(np.max(np.asarray(made.damping)))
    if not np.isfinite(np.asarray(made.damping)).all():
        raise UserError(
            f"{name}: H = E[x x^T] is not positive semi-definite, whatever is added to its diagonal; the statistics "
            "are broken: collect them again in float32"
        )
    q = QTensor(format.pack(made.scales, made.codes), format, axis)
    if not np.isfinite(relative_error(rows, QTensor(q.leaves, format, -1))):
        raise UserError(f"{name}: its values are too large for {format.name}")
    count = 0 if stats.count is None else int(np.min(np.asarray(stats.count)))
    note = f"saw {count} tokens, fewer than its {n} inputs" if recipe.requires and 0 < count < n else ""
    losses = (_mean(made.first_loss), _mean(made.loss), _mean(made.first_heldout_loss), _mean(made.heldout_loss))
    return q, CalibrationReport(*losses, damping, count, time.perf_counter() - clock, note)


def plain(recipe: Recipe) -> Recipe:
    """What is left of a recipe for a weight without statistics: nearest, unweighted."""
    return Recipe((nearest(),), recipe.format, name="rtn")


def relative_error(leaf: Any, q: QTensor) -> float:
    """sqrt(sum (w - w_hat)^2 / sum w^2)."""
    square, error = (float(np.asarray(v)) for v in _squares(jnp.asarray(leaf, jnp.float32), dequantize(q)))
    return (error / square) ** 0.5 if square else 0.0


def _stacked(rows: Array, format: Format, recipe: Recipe, stats: Stats, heldout: Array | None) -> Rounded:
    """`round_weight`, mapped over leading axes one matrix at a time."""

    def one(w: Array, stats: Stats, heldout: Array | None) -> Rounded:
        return round_weight(w, format, recipe.roundings, stats, recipe.damping, heldout)

    if rows.ndim == 2:
        return one(rows, stats, heldout)
    lead = rows.shape[:-2]
    flat = rows.reshape(-1, *rows.shape[-2:])

    def spread(a: Array, own: int) -> Array:
        """A statistic with `own` axes of its own, for every matrix of the stack."""
        shared = (1,) * (len(lead) - (a.ndim - own))
        a = jnp.broadcast_to(a.reshape(*a.shape[: a.ndim - own], *shared, *a.shape[a.ndim - own :]),
                             (*lead, *a.shape[a.ndim - own :]))  # fmt: skip
        return a.reshape(-1, *a.shape[len(lead) :])

    own = {"H": 2, "cross": 2, "samples": 2, "h": 1, "absmean": 1, "absmax": 1, "count": 0}
    each = Stats(**{k: None if getattr(stats, k) is None else spread(getattr(stats, k), o) for k, o in own.items()})
    held = None if heldout is None else spread(heldout, 2)
    made = jax.lax.map(lambda args: one(*args), (flat, each, held))
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), made)


@jax.jit
def _squares(w: Array, w_hat: Array) -> tuple[Array, Array]:
    top = jnp.maximum(jnp.max(jnp.abs(w)), 1e-30)
    return jnp.sum(jnp.square(w / top)), jnp.sum(jnp.square((w - w_hat) / top))


def _mean(loss: Array) -> float | None:
    value = float(np.mean(np.asarray(loss)))
    return value if np.isfinite(value) else None
