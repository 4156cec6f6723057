"""The nearest point of E8P12 by its structure: 256 magnitudes for each of two shifts, and never all 65,536 points.

With M diagonal, the signs of x are those of its nearest point but for one where their number has the wrong parity:

    x = u -+ 1/4     min over signs of |x - q|^2  ~  |a|^2 / 2 - sum_i y_i a_i + [parity] 2 min_i y_i a_i     y = m |x|

and the flipped sign is the one that costs least. In another metric the best of this kind for M's diagonal is the start
of two steps of descent to the best of the 112 neighbours q +- e_i +- e_j of |q|^2 <= 10; on blocks of eight columns of
real H that leaves 2 to 10 % more error than the best of all points, and the nearest point 40 to 170 %.

Vectors are the minor axis, so that the search is arithmetic on whole vectors; [8, N] throughout.
"""

from __future__ import annotations

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.vectors.smallest import smallest
from qjax.typing import Array, Float, UInt8

_STEPS = 2


@cache
def neighbours() -> np.ndarray:
    """+- e_i +- e_j, f32[112, 8]."""
    return np.array([p for p in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, p)) == 2], np.float32)


def nearest(
    u: Float[Array, "8 N"], metric: Float[Array, "8 8"] | None, magnitudes: np.ndarray
) -> tuple[Float[Array, "8 N"], Float[Array, "N"]]:
    """q and whether 1/4 is subtracted from it (1.0) or added (0.0): the point of E8P12 near u.

    Args:
      u: vectors.
      metric: M of their error e M e^T; None: the square.
      magnitudes: of E8P12, f32[256, 8].
    """
    weight = jnp.ones(8, jnp.float32) if metric is None else jnp.diagonal(metric)

    def of_shift(shift: Array) -> tuple[Array, Array]:
        x = u - shift
        q = folded(x, weight, magnitudes)
        if metric is None:
            return q, jnp.sum(jnp.square(x - q), axis=0)
        q = lax.fori_loop(0, _STEPS, lambda _, q: descended(q, x, metric), q)
        return q, jnp.sum((x - q) * _product(metric, x - q), axis=0)

    q, miss = jax.vmap(of_shift)(jnp.array([0.25, -0.25], jnp.float32))
    minus = miss[1] < miss[0]
    return jnp.where(minus[None], q[1], q[0]), minus.astype(jnp.float32)


def folded(x: Float[Array, "8 N"], weight: Float[Array, "8"], magnitudes: np.ndarray) -> Float[Array, "8 N"]:
    """The nearest of the signed magnitudes whose sum is even, in a diagonal metric; exact."""
    a = jnp.asarray(magnitudes)
    odd = jnp.asarray(magnitudes.sum(axis=1) % 2 == 1)
    y = weight[:, None] * jnp.abs(x)
    norm = 0.5 * jnp.sum(a * a * weight[None], axis=1)
    gain = least = y[0][None] * a[:, :1]
    for i in range(1, 8):
        one = y[i][None] * a[:, i, None]
        gain, least = gain + one, jnp.where(one < least, one, least)
    wrong = odd[:, None] != (jnp.sum(x < 0, axis=0) % 2 == 1)[None]
    which = smallest(norm[:, None] - gain + jnp.where(wrong, 2.0 * least, 0.0))[1]
    q = jnp.where(x < 0, -1.0, 1.0) * a[which].T
    turned = jnp.arange(8)[:, None] == jnp.argmin(y * jnp.abs(q), axis=0)[None]
    flip = odd[which] != (jnp.sum(x < 0, axis=0) % 2 == 1)
    return jnp.where(turned & flip[None], -q, q)


def descended(q: Float[Array, "8 N"], x: Float[Array, "8 N"], M: Float[Array, "8 8"]) -> Float[Array, "8 N"]:
    """q or the best of its neighbours: (x - q) M (x - q)^T never grows, and |q|^2 stays at 10 or below if it moves."""
    d = jnp.asarray(neighbours())
    own = jnp.sum(d * _product(d, M), axis=1)
    change = own[:, None] - 2.0 * _product(d, _product(M, x - q))
    inside = jnp.sum(q * q, axis=0)[None] + 2.0 * _product(d, q) + 2.0 < 10.5
    gain, which = smallest(jnp.where(inside, change, 0.0))
    return q + jnp.where((gain < 0)[None], d[which].T, 0.0)


def of_table(u: Float[Array, "8 N"], metric: Float[Array, "8 8"] | None, points: np.ndarray) -> UInt8[Array, "N"]:
    """The nearest of at most 256 points, f32[256, 8]."""
    p = jnp.asarray(points)
    pulled = p if metric is None else _product(p, metric)
    score = 0.5 * jnp.sum(p * pulled, axis=1)[:, None] - _product(pulled, u)
    return smallest(score)[1].astype(jnp.uint8)


def _product(a: Array, b: Array) -> Array:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST)
