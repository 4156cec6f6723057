"""How far H and the cross term may be believed, told by windows that made neither.

Feedback with the factor L of H_a = (1 - a) H + a diag(H) turns the errors s of rounding, which are as good as white,
into E = s L^-1. On tokens that H did not see it costs

    cost(a) = sum_j s_j^2 [L^-1 H' L^-T]_jj,      s_j^2 = mean over rows of (w_ij - nearest(w_ij))^2

whose least a of a few is taken: nothing is rounded for it. The cross term moves the target by Delta = W C H_a^-1; on
held-out tokens a share t of it leaves const - 2 t tr(W C' Delta^T) + t^2 tr(Delta H' Delta^T), so

    t = tr(W C' Delta^T) / tr(Delta H' Delta^T), between 0 and 1

Then the split is forgotten: H and C of all tokens, shrunk by a and t.

Source: ours; the error model is LDLQ's (QuIP, arXiv:2307.13304, section 3). Shrinking to a diagonal: Ledoit and Wolf,
"A well-conditioned estimator for large-dimensional covariance matrices", 2004; here chosen by held-out loss.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Format
from qjax.formats.tiles import group_of
from qjax.rounding.curvature import ordered, proxy
from qjax.rounding.ldlq import corrected
from qjax.stats import Stats
from qjax.typing import Array, Float

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Of the diagonal, tried."""


def toward_diagonal(H: Float[Array, "n n"], a: Float[Array, ""] | float) -> Float[Array, "n n"]:
    """(1 - a) H + a diag(H)."""
    return (1.0 - a) * H + a * jnp.diag(jnp.diagonal(H))


@partial(jax.jit, static_argnames=("format", "damping"))
def shares(
    w: Float[Array, "rows n"], format: Format, used: Stats, heldout: Stats, damping: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(a, t): how far H is to be shrunk toward its diagonal, and what share of the cross term is to be taken.

    Args:
      w: the weight.
      format: its grid: how large errors of rounding are.
      used: H and, for a cross term, cross.
      heldout: the same of tokens that `used` did not see.
      damping: lambda of H + lambda diag(H), which the rounding will add.

    Returns: a, one of SHARES; t in [0, 1], which is 0 without a cross term.
    """
    w = w.astype(jnp.float32)
    assert used.H is not None and heldout.H is not None
    H, H_held = used.H, heldout.H
    tile, group = format.tile[1], group_of(format, w.shape[1])
    importance = jnp.broadcast_to(jnp.diagonal(H), w.shape)
    s2 = jnp.mean(jnp.square(w - format.decode(*format.encode(w, importance))), axis=0)

    def cost(a: Array) -> Array:
        f = ordered(toward_diagonal(H, a), damping, "act", tile, group)
        L = f.c / jnp.diagonal(f.c)[None, :]
        solve = partial(jax.scipy.linalg.solve_triangular, L, lower=True, unit_diagonal=True)
        left = jnp.diagonal(solve(solve(H_held[f.order][:, f.order]).T))
        return jnp.where(jnp.all(jnp.isfinite(left)), jnp.sum(s2[f.order] * left), jnp.inf)

    costs = lax.map(cost, jnp.asarray(SHARES, jnp.float32))
    a = jnp.asarray(SHARES, jnp.float32)[jnp.argmin(costs)]
    if used.cross is None or heldout.cross is None:
        return a, jnp.float32(0.0)
    f = ordered(toward_diagonal(H, a), damping, "act", tile, group)
    delta = corrected(w, used.cross, 1.0, f.c, f.order) - w
    agreed = jnp.sum(lax.dot(w, heldout.cross, precision=lax.Precision.HIGHEST) * delta)
    size = jnp.sum(proxy(delta, H_held))
    return a, jnp.clip(jnp.where(size > 0, agreed / jnp.where(size > 0, size, 1.0), 0.0), 0.0, 1.0)


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
                 a.count + b.count)  # fmt: skip


def output_error(w: Float[Array, "rows n"], w_hat: Float[Array, "rows n"], heldout: Stats) -> Float[Array, ""]:
    """E|W x_float - W_hat x|^2 on held-out tokens, less what no W_hat changes: tr(E H' E^T) + 2 tr(W C' E^T)."""
    assert heldout.H is not None
    e = w - w_hat
    error = jnp.sum(proxy(e, heldout.H))
    if heldout.cross is None:
        return error
    return error + 2.0 * jnp.sum(lax.dot(w, heldout.cross, precision=lax.Precision.HIGHEST) * e)
