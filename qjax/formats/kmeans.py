"""Weighted k-means of numbers, many rows side by side: the levels of least sum v (x - level)^2.

    start    levels at even shares of  integral (v f)^(1/3) dx,  f the density of x        (Panter & Dite, 1951)
    step     every x to its nearest level, every level to the weighted mean of its own     (Lloyd, 1957)

The start is the best for many levels and smooth densities: between sorted x's it is sum v^(1/3) dx^(2/3). No step makes
the error larger. A level that no x is nearest to is put where an x misses its own by most, which repairs collapsed
starts; one that still has none, as where there are fewer distinct numbers than levels, stays where it is. There is no
randomness; the levels are a local optimum, not the best partition of all.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.storage import over
from qjax.typing import Array, Float, Int

STEPS = 30


def kmeans(
    x: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None, count: int, steps: int = STEPS
) -> Float[Array, "*b k"]:
    """The levels of each row, ascending at the start.

    Args:
      x: numbers.
      weight: v, not negative; None: ones.
      count: k.
      steps: of Lloyd's.
    """
    v = jnp.ones_like(x) if weight is None else jnp.broadcast_to(weight, x.shape)

    def one(_: Array, levels: Array) -> Array:
        return lloyd(x, v, repaired(x, v, levels))

    return lax.fori_loop(0, steps, one, spread(x, v, count))


def spread(x: Float[Array, "*b n"], v: Float[Array, "*b n"], count: int) -> Float[Array, "*b k"]:
    """The start: see the module's docstring."""
    order = jnp.argsort(x, axis=-1)
    x, v = (jnp.take_along_axis(a, order, axis=-1) for a in (x, v))
    gap = x[..., 1:] - x[..., :-1]
    share = jnp.cbrt(0.5 * (v[..., 1:] + v[..., :-1])) * jnp.square(jnp.cbrt(gap))
    mass = jnp.cumsum(jnp.pad(share, [(0, 0)] * (x.ndim - 1) + [(1, 0)]), axis=-1)
    wanted = mass[..., -1:] * jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32).reshape(
        *[1] * (x.ndim - 1), -1
    )
    at = jnp.sum((mass[..., None, :] < wanted[..., None]).astype(jnp.int32), axis=-1)
    return jnp.take_along_axis(x, at, axis=-1)


def lloyd(x: Float[Array, "*b n"], v: Float[Array, "*b n"], levels: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """One step. Means are taken of distances to the level, so that rounding cannot carry one away from its own."""
    own = jnp.where(_own(x, levels), v[..., None, :], 0.0)
    mass = jnp.sum(own, axis=-1)
    off = jnp.sum(own * (x[..., None, :] - levels[..., None]), axis=-1)
    return levels + over(off, mass)


def repaired(x: Float[Array, "*b n"], v: Float[Array, "*b n"], levels: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """Levels without an x moved, one after another, to the x's of largest v (x - level)^2; the error cannot grow."""
    used = jnp.any(_own(x, levels) & (v[..., None, :] > 0), axis=-1)
    missed = v * jnp.square(x - jnp.take_along_axis(levels, assigned(x, levels), axis=-1))
    top, worst = lax.top_k(missed, min(levels.shape[-1], x.shape[-1]))
    rank = jnp.clip(jnp.cumsum((~used).astype(jnp.int32), axis=-1) - 1, 0, worst.shape[-1] - 1)
    there = jnp.take_along_axis(jnp.take_along_axis(x, worst, axis=-1), rank, axis=-1)
    return jnp.where(~used & (jnp.take_along_axis(top, rank, axis=-1) > 0), there, levels)


def _own(x: Array, levels: Array) -> Array:
    """Whether each x is nearest to each level: bool[*b, k, n]."""
    return assigned(x, levels)[..., None, :] == jnp.arange(levels.shape[-1]).reshape(*[1] * (x.ndim - 1), -1, 1)


def assigned(x: Float[Array, "*b n"], levels: Float[Array, "*b k"]) -> Int[Array, "*b n"]:
    """The level nearest to each x; of two as near the one that comes first."""
    code, least = jnp.zeros(x.shape, jnp.int32), jnp.abs(x - levels[..., :1])
    for k in range(1, levels.shape[-1]):  # comparisons: a look-up would not vectorize
        off = jnp.abs(x - levels[..., k : k + 1])
        code, least = jnp.where(off < least, k, code), jnp.minimum(off, least)
    return code
