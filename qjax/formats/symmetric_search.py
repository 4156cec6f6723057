"""Scales of a super-block, each an integer times one fp16 number, without minima: Q3_K, Q6_K and IQ4_XS.

    minimize  sum_ij v_ij (x_ij - d sc_j T(q_ij))^2      T a fixed table of levels,  sc_j in [-S, S - 1]

1. Real scales. The levels reach further below zero than above, so a trial maps a sub-block's largest magnitude onto a
   level near the lowest, or (the scale then has the other sign) near the highest's negative; true errors judge.
2. d from the largest scale, with headroom so that the largest may still grow.
3. For each sub-block the best integer scale of a whole neighbourhood, judged by the true error of the re-rounded
   codes; d by least squares; nearer neighbours; and again.

The error as a function of a scale is jagged: with 16 or 32 weights, neighbouring integer scales differ by as much luck
in the roundings as by size. Looking at many of exactly those scales that can be stored keeps the luck; ggml
(make_qx_quants, make_q3_quants, quantize_row_iq4_nl_impl) searches real scales and loses most of it when it rounds
them to integers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.levels import Levels
from qjax.formats.protocol import Scales
from qjax.formats.stores import Multiple
from qjax.formats.superblock import ByReciprocal, by_chunks, keep, once, reciprocal, squares, store, unless_beyond


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """How hard to look.

    Attributes:
      steps: S, the integer scales' reach.
      trials: the levels, of either sign, that the largest magnitude is mapped onto.
      down, up: integer steps tried below and above the nearest integer's magnitude.
      headroom: how much larger than necessary the first d is.
      rounds: integer searches; all but the first look one step around.
    """

    steps: int
    trials: tuple[float, ...]
    down: int
    up: int
    headroom: float = 1.0
    rounds: int = 2

    @property
    def moves(self) -> tuple[int, ...]:
        """Steps in magnitude, the nearest three first."""
        return tuple(sorted(range(-self.down, self.up + 1), key=abs))


def search_symmetric(
    x: Array, v: Array | None, nearest: Callable[[Array], Array], how: Symmetric
) -> tuple[Array, Array]:
    """The best scales found.

    Args:
      x: f32[sub, J, N].
      v: importance like x, or None for 1.
      nearest: T of each number of units: f32 -> f32.
      how: the search's size.

    Returns: d f32[N] (an fp16 number), sc i8[J, N].
    """
    s = real_scales(x, v, nearest, how.trials)
    low, high = jnp.min(s, axis=0), jnp.max(s, axis=0)
    d = store(jnp.where(high > -low, high, low) * (-how.headroom / how.steps))
    sc = jnp.clip(jnp.round(s * reciprocal(d)[None]), -how.steps, how.steps - 1)
    moves = jnp.asarray(how.moves, jnp.float32)

    def neighbours(d: Array, sc: Array, count: Array) -> tuple[Array, Array]:
        side = jnp.where(sc < 0, -1.0, 1.0)

        def trial(i: Array, best: tuple[Array, Array]) -> tuple[Array, ...]:
            n = jnp.clip(sc + moves[i] * side, -how.steps, how.steps - 1)
            e = error(x, v, n * d[None], nearest)
            return keep(e < best[0], (e, n), best)

        e, sc = lax.fori_loop(0, count, trial, (jnp.full_like(sc, jnp.inf), sc))
        return jnp.sum(e, axis=0), sc

    def one_round(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        _, d, sc = best
        d = jnp.where(i == 0, d, refit(x, v, d, sc, nearest))
        e, sc = neighbours(d, sc, jnp.where(i == 0, len(how.moves), 3))
        return keep(e < best[0], (e, d, sc), best)

    _, found, sc = lax.fori_loop(0, how.rounds, one_round, (jnp.full_like(d, jnp.inf), d, sc))
    return unless_beyond(d, found), sc.astype(jnp.int8)


def real_scales(x: Array, v: Array | None, nearest: Callable[[Array], Array], trials: tuple[float, ...]) -> Array:
    """The best of the scales that map the largest magnitude onto a trial level: f32[J, N]."""
    low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
    far = jnp.where(high > -low, high, low)
    shares = jnp.asarray([1 / t for t in trials], jnp.float32)
    if len(trials) == 1:
        return far * shares[0]

    def trial(i: Array, best: tuple[Array, Array]) -> tuple[Array, ...]:
        s = far * shares[i]
        e = error(x, v, s, nearest)
        return keep(e < best[0], (e, s), best)

    return lax.fori_loop(0, len(trials), trial, (jnp.full_like(far, jnp.inf), far))[1]


def error(x: Array, v: Array | None, s: Array, nearest: Callable[[Array], Array]) -> Array:
    """sum v (x - s T)^2 over elements, T nearest to x / s: f32[J, N]."""
    s, inverse = once(s, reciprocal(s))
    return squares(x - s[None] * nearest(x * inverse[None]), v)


def refit(x: Array, v: Array | None, d: Array, sc: Array, nearest: Callable[[Array], Array]) -> Array:
    """Least squares for d, given the integers and the levels they lead to: f32[N]."""
    (inverse,) = once(reciprocal(sc * d[None]))
    (t,) = once(nearest(x * inverse[None]))
    vt = t if v is None else v * t
    tx, tt = jnp.sum(sc * jnp.sum(vt * x, axis=0), axis=0), jnp.sum(sc * sc * jnp.sum(vt * t, axis=0), axis=0)
    return store(tx * reciprocal(tt))


@dataclasses.dataclass(frozen=True)
class SymmetricScales(ByReciprocal):
    """s = d sc: {"d": f32[*b, n / 256] (fp16 numbers), "sc": i8[*b, n / 256, 256 / sub]}."""

    how: Symmetric
    sub: int
    block: int = 256

    @property
    def scale(self) -> Multiple:
        return Multiple("sc", "d", -self.how.steps, self.how.steps - 1)

    def fit(self, levels: Levels, w: Array, weight: Array | None) -> Scales:
        """The scales of least squared error found."""

        def search(x: Array, v: Array | None) -> tuple[Array, Array]:
            return search_symmetric(x, v, lambda u: levels.round(u)[0], self.how)

        return dict(zip(("d", "sc"), by_chunks(search, w, weight, self.block, self.sub), strict=True))
