"""Scales of least weighted error for a table of levels: many candidates, blocks side by side (superblock.py).

    minimize over s   sum_i v_i (x_i - s T(x_i / s))^2  =  sum v x^2 - A^2 / B       T the nearest level
    A = sum v x T,  B = sum v T^2,  s = A / B the best scale for the levels that a candidate leads to

Candidates are multiples of the block's absmax, then others around the best, then the fitted s itself, twice: 41 in all,
which beat an even grid of 96. Each takes two sums and a chain of comparisons over blocks side by side: with a block's
weights in the minor axis, or a search through the table, a candidate takes twice as long.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.levels import Levels
from qjax.formats.superblock import by_chunks, once, total

_COARSE = np.geomspace(1.4, 0.5, 32)  # times the absmax; an outlier may do best on a lower level
_FINE = (_COARSE[1] / _COARSE[0]) ** np.array([-0.75, -0.5, -0.25, 0.25, 0.5, 0.75])  # times the best of these
_POLISH = 2
_SUB = 64  # weights that are summed in one expression
_MARGIN = 1 + 1e-6  # candidates that lead to the same levels differ by rounding alone


def search_absmax(w: Array, weight: Array, block: int, levels: Levels) -> Array:
    """The scale of each block.

    Args:
      w: f32[*b, n].
      weight: importance f32[*b, n], not negative.
      block: weights of a block.
      levels: within [-1, 1].

    Returns: f32[*b, n / block].
    """

    def level(u: Array) -> Array:
        return levels.round(u)[0]

    (s,) = by_chunks(lambda x, v: (_best(x, v, level),), w, weight, block, min(block, _SUB))
    return s


def _best(x: Array, v: Array | None, level: Callable[[Array], Array]) -> Array:
    """x, v f32[sub, J, N] -> s f32[N]."""
    assert v is not None
    absmax = jnp.max(jnp.abs(x), axis=(0, 1), keepdims=True)
    v = jnp.where(jnp.max(v, axis=(0, 1), keepdims=True) > 0, v, 1.0)
    u = jnp.where(absmax > 0, x / jnp.where(absmax > 0, absmax, 1.0), 0.0)
    u, vu, v = once(u, v * u, v)

    def fitted(ratio: Array) -> tuple[Array, Array]:
        (t,) = once(level(u * (1.0 / ratio)[None, None]))
        a, b = jnp.sum(total(vu * t), axis=0), jnp.sum(total(v * t * t), axis=0)
        s = jnp.where((a > 0) & (b > 0), a / jnp.where(b > 0, b, 1.0), 0.0)
        return s, s * a

    def trial(i: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        s, gain, ratio = now
        tried = jnp.where(i < len(_COARSE), factors[i], jnp.where(i < len(factors) - _POLISH, ratio * factors[i], s))
        new, its_gain = fitted(tried)
        better = its_gain > gain * _MARGIN
        ratio = jnp.where(better & (i < len(_COARSE)), tried, ratio)
        return jnp.where(better, new, s), jnp.where(better, its_gain, gain), ratio

    factors = jnp.asarray(np.concatenate([_COARSE, _FINE, np.ones(_POLISH)]), jnp.float32)
    s, gain = fitted(jnp.ones_like(absmax[0, 0]))
    first = (jnp.where(gain > 0, s, 1.0), gain, jnp.ones_like(gain))
    s, _, _ = lax.fori_loop(0, len(factors), trial, first)
    return absmax[0, 0] * s
