"""How far H and the cross term may be believed, told by windows that made neither.

Feedback with the factor L of H_a = (1 - a) H + a diag(H) turns the errors s of rounding, which are as good as white,
into E = s L^-1. On tokens that H did not see it costs

    cost(a) = sum_j s_j^2 [L^-1 H' L^-T]_jj,      s_j^2 = mean over rows of (w_ij - nearest(w_ij))^2

whose least a of a few is taken: nothing is rounded for it, and the bracket is the same for all weights of an input. The
cross term moves the target by Delta = W C H_a^-1; on held-out tokens a share t of it leaves
const - 2 t tr(W C' Delta^T) + t^2 tr(Delta H' Delta^T), so

    t = tr(W C' Delta^T) / tr(Delta H' Delta^T), between 0 and 1

Then the split is forgotten: H and C of all tokens, shrunk by a and t.

Source: ours; the error model is LDLQ's (QuIP, arXiv:2307.13304, section 3). Shrinking to a diagonal: Ledoit and Wolf,
"A well-conditioned estimator for large-dimensional covariance matrices", 2004; here chosen by held-out loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Format
from qjax.formats.tiles import group_of
from qjax.rounding.curvature import ordered, proxy, two_sided_loss, weighed
from qjax.rounding.ldlq import corrected
from qjax.stats import Stats
from qjax.typing import Array, Float

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Of the diagonal, tried."""
_BEGIN = 3


def toward_diagonal(H: Float[Array, "n n"], a: Float[Array, ""] | float) -> Float[Array, "n n"]:
    """(1 - a) H + a diag(H)."""
    return (1.0 - a) * H + a * jnp.diag(jnp.diagonal(H))


@dataclasses.dataclass(frozen=True)
class Split:
    """Statistics of tokens that are used and of those held out; what one weight asks of them serves the others.

    Attributes:
      used: H, count and, for a cross term, cross.
      heldout: the same of tokens that `used` did not see.
      damping: lambda of H + lambda diag(H), which the rounding will add.
    """

    used: Stats
    heldout: Stats
    damping: float
    _left: dict[tuple[float, int, int], Float[Array, "n"]] = dataclasses.field(default_factory=dict)

    def left(self, a: float, format: Format) -> Float[Array, "n"]:
        """diag(L^-1 H' L^-T): what a unit of rounding error in each column costs, f32[n]; see `leftover`."""
        assert self.used.H is not None and self.heldout.H is not None
        key = a, format.tile[1], group_of(format, self.used.H.shape[-1])
        if key not in self._left:
            self._left[key] = leftover(self.used.H, self.heldout.H, *key, self.damping)
        return self._left[key]


def shares(w: Float[Array, "rows n"], fit: Float[Array, "rows n"], format: Format, split: Split) -> tuple[float, Array]:
    """(a, t): how far H is to be shrunk toward its diagonal, and what share of the cross term is to be taken.

    Args:
      w: the weight.
      fit: the same, rounded to nearest: how large errors of rounding are.
      format: its grid.
      split: of its input.

    Returns: a, one of SHARES, a least cost beside its neighbours; t f32[] in [0, 1], which is 0 without a cross term.
    """
    s2 = jnp.mean(jnp.square(w - fit), axis=0)
    a, _ = least_share(lambda a: float(jnp.sum(s2 * split.left(a, format))))
    if split.used.cross is None or split.heldout.cross is None:
        return a, jnp.float32(0.0)
    key = format.tile[1], group_of(format, w.shape[1])
    return a, cross_share(w, split.used, split.heldout, a, *key, split.damping)


def least_share(cost: Callable[[float], float]) -> tuple[float, float]:
    """One of SHARES whose cost is least beside its neighbours', and that cost: down the ladder or up to a valley."""
    at = _BEGIN
    costs = {i: cost(SHARES[i]) for i in (at - 1, at, at + 1)}
    while (least := min(costs, key=lambda i: (costs[i], i))) != at:
        at = least
        costs |= {i: cost(SHARES[i]) for i in (at - 1, at + 1) if 0 <= i < len(SHARES) and i not in costs}
    return SHARES[at], costs[at]


@partial(jax.jit, static_argnames=("tile", "group"))
def leftover(
    H: Float[Array, "n n"],
    heldout: Float[Array, "n n"],
    a: float | Array,
    tile: int,
    group: int,
    damping: float | Array,
) -> Float[Array, "n"]:
    """diag(L^-1 H' L^-T) with L the unit lower factor of H_a in act-order; infinite where H_a has none."""
    f = ordered(toward_diagonal(H, a), damping, "act", tile, group)
    left = jnp.square(jnp.diagonal(f.c)) * behind_factor(f.c, heldout[f.order][:, f.order])  # L = c / diag(c)
    left = jnp.where(jnp.all(jnp.isfinite(left)), left, jnp.inf)
    return jnp.zeros_like(left).at[f.order].set(left)


def behind_factor(lower: Float[Array, "n n"], H: Float[Array, "n n"]) -> Float[Array, "n"]:
    """diag(L^-1 H L^-T) of a lower triangular L; infinite where L is not finite."""
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(H.shape[0], dtype=H.dtype), lower=True)
    H = lax.optimization_barrier(H)  # XLA would look each factor of the product up where H is a look-up
    left = jnp.sum(lax.dot(inverse, H, precision=lax.Precision.HIGHEST) * inverse, axis=1)
    return jnp.where(jnp.all(jnp.isfinite(left)), left, jnp.inf)


@partial(jax.jit, static_argnames=("tile", "group"))
def cross_share(
    w: Float[Array, "rows n"], used: Stats, heldout: Stats, a: float | Array, tile: int, group: int,
    damping: float | Array,
) -> Float[Array, ""]:  # fmt: skip
    """t = tr(W C' Delta^T) / tr(Delta H' Delta^T), between 0 and 1, with Delta = W C H_a^-1."""
    assert used.H is not None and heldout.H is not None and heldout.cross is not None
    f = ordered(toward_diagonal(used.H, a), damping, "act", tile, group)
    delta = corrected(w, used.cross, 1.0, f.c, f.order) - w
    agreed = jnp.sum(lax.dot(w, heldout.cross, precision=lax.Precision.HIGHEST) * delta)
    size = jnp.sum(proxy(delta, heldout.H))
    return jnp.clip(jnp.where(size > 0, agreed / jnp.where(size > 0, size, 1.0), 0.0), 0.0, 1.0)


def shrunk(stats: Stats, a: Float[Array, ""] | float, t: Float[Array, ""] | float) -> Stats:
    """H shrunk toward its diagonal, a share of the cross term, the rest as it is."""
    assert stats.H is not None
    cross = None if stats.cross is None else t * stats.cross
    return dataclasses.replace(stats, H=toward_diagonal(stats.H, a), cross=cross)


def pooled(a: Stats, b: Stats) -> Stats:
    """The means over the tokens of both; samples are those of `a`."""
    assert a.count is not None and b.count is not None
    share = a.count / jnp.maximum(a.count + b.count, 1.0)

    def mean(x: Array | None, y: Array | None) -> Array | None:
        return None if x is None or y is None else share * x + (1.0 - share) * y

    absmax = None if a.absmax is None or b.absmax is None else jnp.maximum(a.absmax, b.absmax)
    return Stats(mean(a.H, b.H), mean(a.h, b.h), mean(a.absmean, b.absmean), absmax, mean(a.cross, b.cross), a.samples,
                 a.count + b.count, mean(a.G, b.G))  # fmt: skip


@jax.jit
def output_error(w: Float[Array, "rows n"], w_hat: Float[Array, "rows n"], heldout: Stats) -> Float[Array, ""]:
    """E|W x_float - W_hat x|^2 on held-out tokens, less what no W_hat changes: tr(E H' E^T) + 2 tr(W C' E^T); where G'
    of the output is known, in its metric: tr(G' E H' E^T) + 2 tr(G' W C' E^T)."""
    assert heldout.H is not None
    e = w - w_hat
    error = two_sided_loss(e, heldout.H, heldout.G)
    if heldout.cross is None:
        return error
    return error + 2.0 * jnp.sum(lax.dot(w, heldout.cross, precision=lax.Precision.HIGHEST) * weighed(e, heldout.G))
