"""Weighted search for the scale (and minimum) of a block of integer levels.

    minimize over (d, m) in fp16   sum_j weight_j (x_j - d l_j - m)^2,   l_j the nearest level in [low, high]

Each candidate maps the block's largest magnitude (or its range) onto a trial level, rounds, solves the weighted least
squares for those codes in closed form, rounds the solution to fp16, rounds the weights again with what will be
stored, and is judged by the error of that. Candidates run in one compiled loop with a running best, so memory does
not grow with their number. The trial levels are ggml's idea (make_qx_quants, make_qkx3_quants); ggml judges before it
rounds to fp16, keeps the codes of the unrounded scale, and knows only one sign of the scale and minima below zero.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.storage import reciprocal, round_fp16

Best = tuple[Array, Array, Array]  # d, m, error

_POLISH = 3
_STRETCH = np.arange(-2.0, 2.01, 0.4)  # the level of the maximum less that of the minimum, from the highest code
_SHIFT = (-0.8, -0.4, 0.0, 0.4, 0.8)  # the level of the minimum
_SMALL = 1e-30  # blocks below have no fp16 scale; kept from dividing by zero


def search_scale(x: Array, weight: Array, start: Array, low: int, high: int) -> Array:
    """The best fp16 scale found for x ~ d l, l in [low, high].

    Args:
      x: f32[*b, block].
      weight: importance, f32[*b, block], not negative.
      start: f32[*b, 1], the fp16 scale to beat.
      low, high: the range of the codes.

    Returns: f32[*b, 1]; never worse than `start`.
    """
    u, unit = _normalized(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    v = _relative(weight)
    levels = jnp.asarray(_levels(low, high), jnp.float32)

    def codes(inverse: Array) -> Array:
        return jnp.clip(jnp.round(u * inverse), low, high)

    def solve(l: Array) -> Array:
        s = _sum(v * u * l) * reciprocal(_sum(v * l * l))
        return _fp16(s * unit)

    def error(d: Array) -> Array:
        s = d / unit
        return _sum(v * jnp.square(u - s * codes(reciprocal(s))))

    def keep(best: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
        e = error(d)
        better = e < best[1]
        return jnp.where(better, d, best[0]), jnp.where(better, e, best[1])

    best = (start, _to_beat(error(start), start))
    best = lax.fori_loop(0, len(levels), lambda i, b: keep(b, solve(codes(levels[i]))), best)
    best = lax.fori_loop(0, _POLISH, lambda i, b: keep(b, solve(codes(reciprocal(b[0] / unit)))), best)
    return best[0]


def search_scale_min(x: Array, weight: Array, start: tuple[Array, Array], high: int) -> tuple[Array, Array]:
    """The best fp16 scale and minimum found for x ~ d l + m, l in [0, high].

    Args:
      x: f32[*b, block].
      weight: importance, f32[*b, block], not negative.
      start: (d, m), each f32[*b, 1], the fp16 pair to beat.
      high: the largest code.

    Returns: (d, m), each f32[*b, 1]; never worse than `start`.
    """
    least = jnp.min(x, axis=-1, keepdims=True)
    u, unit = _normalized(x - least, jnp.max(x, axis=-1, keepdims=True) - least)
    v = _relative(weight)
    sum_v, sum_u = _sum(v), _sum(v * u)
    trials = jnp.asarray([(high + a, b) for a in _STRETCH for b in _SHIFT], jnp.float32)

    def codes(d: Array, m: Array) -> Array:
        return jnp.clip(jnp.round((u - (m - least) / unit) * reciprocal(d / unit)), 0, high)

    def solve(l: Array) -> tuple[Array, Array]:
        vl = v * l
        sum_l, sum_ll, sum_ul = _sum(vl), _sum(vl * l), _sum(vl * u)
        t = (sum_ll * sum_u - sum_l * sum_ul) * reciprocal(sum_v * sum_ll - sum_l * sum_l)
        m = _fp16(least + t * unit)
        t = (m - least) / unit  # the scale is solved again for the minimum as stored
        return _fp16((sum_ul - t * sum_l) * reciprocal(sum_ll) * unit), m

    def keep(best: Best, l: Array) -> tuple[Best, Array]:
        """The better of the best and the solution for codes l; and the codes that solution rounds to."""
        d, m = solve(l)
        e, l = error(d, m)
        better = e < best[2]
        return (
            jnp.where(better, d, best[0]),
            jnp.where(better, m, best[1]),
            jnp.where(better, e, best[2]),
        ), l

    def error(d: Array, m: Array) -> tuple[Array, Array]:
        l = codes(d, m)
        return _sum(v * jnp.square(u - (m - least) / unit - d / unit * l)), l

    def trial(i: Array, best: Best) -> Best:
        best, l = keep(best, jnp.clip(jnp.round(u * trials[i, 0] + trials[i, 1]), 0, high))
        return keep(best, l)[0]

    def polish(i: Array, best: Best) -> Best:
        return keep(best, codes(best[0], best[1]))[0]

    best = (*start, _to_beat(error(*start)[0], *start))
    best = lax.fori_loop(0, len(trials), trial, best)
    best = lax.fori_loop(0, _POLISH, polish, best)
    return best[0], best[1]


def _levels(low: int, high: int) -> np.ndarray:
    """Where to put the largest magnitude: around the outermost level, and beyond it (the weight is then clipped).

    Both directions where the range is lopsided, as the block's peak may be the one or the other end.
    """
    far = max(-low, high)
    if far == 1:
        levels = np.geomspace(0.55, 16, 48)
    else:
        levels = np.concatenate([far + np.arange(-0.9, 0.91, 0.1) * max(1, far / 32), far * np.linspace(1.15, 1.6, 10)])
    return levels if low == -high else np.concatenate([levels, -levels])


def _to_beat(error: Array, *start: Array) -> Array:
    """The error of the start; of one beyond fp16 none is smaller: it stays, and what it decodes to says so."""
    beyond = jnp.any(jnp.isinf(jnp.stack(start)), axis=0)
    return jnp.where(beyond, -jnp.inf, jnp.where(jnp.isnan(error), jnp.inf, error))


def _sum(x: Array) -> Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _normalized(x: Array, size: Array) -> tuple[Array, Array]:
    unit = jnp.where(size > _SMALL, size, 1.0)
    return x / unit, unit


def _relative(weight: Array) -> Array:
    """Importance with 1 as the largest of a block: only ratios matter, and sums then neither overflow nor vanish."""
    largest = jnp.max(weight, axis=-1, keepdims=True)
    return weight / jnp.where(largest > 0, largest, 1.0)


def _fp16(x: Array) -> Array:
    """Rounded to fp16; a solution that is not finite becomes 0, one beyond fp16 infinite: no error is below its NaN."""
    return round_fp16(jnp.where(jnp.isfinite(x), x, 0.0))
