"""Scales of least weighted squared error, by a scan over candidates with a closed-form fit at each.

For fixed codes the error is quadratic in the scale, so a candidate s is worth not its own error but that of the best
scale for the codes it leads to. With v = level(x / s) the nearest unit levels,

    min_t  sum h (x - t v)^2  =  sum h x^2 - A^2 / B,     A = sum h x v,  B = sum h v^2,  t = A / B

and with a free offset the same holds for the regression line through (q, x). All groups are searched at once and
candidates one after another, so memory stays that of a few copies of x. Everything is relative to the group's own
largest weight and width: nothing underflows, and a power of two times x gives that power of two times s.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qjax.typing import Array

# Candidates that lead to the same codes differ by rounding alone; only a gain above it may replace an earlier one,
# so that the choice does not hang on how XLA orders a sum.
_MARGIN = 1 + 1e-6


def search_scale(
    x: Array, weight: Array | None, level: Callable[[Array], Array], start: Array, low: float, count: int = 96
) -> Array:
    """The scale s minimizing sum weight (x - s level(x / s))^2 in each group.

    Args:
      x: f32[*b, g].
      weight: f32[*b, g], not negative, or None for ones.
      level: the nearest level of the unit grid, elementwise.
      start: f32[*b], a scale that spans the group; candidates are multiples of it.
      low: the smallest multiple tried; the largest is 1.4 (an outlier may do best on a lower code).
      count: candidates, spaced geometrically.

    Returns: f32[*b].
    """
    u, h = _unit(x, start), _normal(x, weight)

    def step(best: tuple[Array, Array], ratio: Array):
        fitted, gain = _project(u, h, level(u / ratio))
        better = gain > best[1] * _MARGIN
        return (jnp.where(better, fitted, best[0]), jnp.where(better, gain, best[1])), None

    fitted, gain = _project(u, h, level(u))
    first = (jnp.where(gain > 0, fitted, 1.0), gain)
    (ratio, _), _ = lax.scan(step, first, jnp.geomspace(1.4, low, count, dtype=jnp.float32))
    return start * ratio


def search_range(
    x: Array, weight: Array | None, low: Array, high: Array, top: int, free: bool, shrink: float
) -> tuple[Array, Array]:
    """Scale and offset of x ~ s q + m, q in 0..top: all pairs of shrunken ends of [low, high], then around the best.

    Args:
      x: f32[*b, g].
      weight: f32[*b, g] or None.
      low, high: f32[*b], the range; it shrinks about its middle if `free`, about 0 otherwise.
      top: the largest code.
      free: m is any number; otherwise m = -s z with an integer z in 0..top.
      shrink: the smallest factor for an end; 1 is the largest.

    Returns: s, m, each f32[*b].
    """
    middle = (low + high) / 2 if free else jnp.zeros_like(low)
    span = high - low
    u, h = _unit(x - middle[..., None], span), _normal(x, weight)
    a, b = _unit(low - middle, span, 0), _unit(high - middle, span, 0)

    def judged(best: tuple[Array, Array, Array], s: Array, z: Array) -> tuple[Array, Array, Array]:
        z = z if free else jnp.clip(jnp.round(z), 0, top)
        q = jnp.clip(jnp.round(_unit(u, s) + z[..., None]), 0, top)
        if free:
            new = line(u, h, q)
        else:
            s, gain = _project(u, h, q - z[..., None])
            new = s, -s * z, gain
        better = new[2] > best[2] * _MARGIN
        return jax.tree.map(lambda n, o: jnp.where(better, n, o), new, best)

    def ends(best: tuple[Array, Array, Array], factors: Array):
        lo, hi = a * factors[0], b * factors[1]
        s = (hi - lo) / top
        return judged(best, s, _unit(-lo, s, 0)), None

    zero = jnp.zeros_like(span)
    factors = jnp.geomspace(1.0, shrink, 12, dtype=jnp.float32)
    coarse, _ = lax.scan(ends, (zero, zero, zero), _pairs(factors, factors))

    def around(best: tuple[Array, Array, Array], move: Array):
        s, m, _ = coarse
        return judged(best, s * move[0], _unit(-m, s, 0) + move[1]), None

    moves = _pairs(jnp.geomspace(1.2, 0.8, 24, dtype=jnp.float32), jnp.arange(-1.0, 2.0, dtype=jnp.float32))
    (s, m, _), _ = lax.scan(around, coarse, moves)
    return s * span, m * span + middle


def fitted_scale(x: Array, weight: Array | None, v: Array, default: Array) -> Array:
    """The least-squares scale of x ~ s v, f32[*b]; the default where it would not be positive."""
    s, gain = _project(x, _normal(x, weight), v)
    return jnp.where(gain > 0, s, default)


def line(x: Array, weight: Array | None, q: Array) -> tuple[Array, Array, Array]:
    """The weighted regression line x ~ s q + m: s, m and what it takes off sum h x^2; s = 0 unless positive."""
    h = _normal(x, weight)
    total = h.sum(axis=-1)
    mx, mq = (h * x).sum(axis=-1) / total, (h * q).sum(axis=-1) / total
    dq = q - mq[..., None]
    cov, var = (h * x * dq).sum(axis=-1), (h * dq * dq).sum(axis=-1)
    s = jnp.where((cov > 0) & (var > 0), cov / jnp.where(var > 0, var, 1.0), 0.0)
    return s, mx - s * mq, s * cov + total * mx * mx


def weighted_error(x: Array, weight: Array | None, x_hat: Array) -> Array:
    """sum weight (x - x_hat)^2 over the last axis, in units of x's and the weight's largest: to compare, not to add."""
    d = _unit(x - x_hat, jnp.max(jnp.abs(x), axis=-1))
    return (_normal(x, weight) * d * d).sum(axis=-1)


def _pairs(a: Array, b: Array) -> Array:
    return jnp.stack(jnp.meshgrid(a, b, indexing="ij"), axis=-1).reshape(-1, 2)


def _project(x: Array, h: Array, v: Array) -> tuple[Array, Array]:
    """A / B and A^2 / B, both 0 unless A and B are positive."""
    a, b = (h * x * v).sum(axis=-1), (h * v * v).sum(axis=-1)
    s = jnp.where((a > 0) & (b > 0), a / jnp.where(b > 0, b, 1.0), 0.0)
    return s, s * a


def _unit(x: Array, scale: Array, axes: int = 1) -> Array:
    """x / scale, and 0 where the scale is 0; the scale gets `axes` axes behind."""
    scale = scale.reshape(scale.shape + (1,) * axes)
    return jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)


def _normal(x: Array, weight: Array | None) -> Array:
    """The weight over its largest value in the group: the same minimum, no underflow. Ones for None or all zeros."""
    if weight is None:
        return jnp.ones_like(x)
    top = jnp.max(weight, axis=-1, keepdims=True)
    return jnp.where(top > 0, weight / jnp.where(top > 0, top, 1.0), 1.0)
