"""Scales and minima of a super-block, each an integer times one fp16 number: the search behind Q2_K, Q4_K and Q5_K.

    minimize  sum_ij v_ij (x_ij - d sc_j q_ij + dmin mn_j)^2     q_ij in [0, Q],  sc_j, mn_j in [0, S]

1. Real scales. For a grid of trial ranges, each shortened at either end by some share, round and solve the weighted
   least squares for (scale, minimum) with those codes; keep the best, and once more from the best.
2. d and dmin from the largest scale and minimum.
3. Rounds of: for each sub-block, the best (sc, mn) among integer neighbours, judged by the true error with the codes
   re-rounded; then (d, dmin) by least squares given the integers and codes, rounded to fp16. The best round wins.

ggml (make_qkx2_quants, make_qkx3_quants, make_qp_quants) tries only ranges shortened symmetrically, weighs errors by
|x| where no importance is given, and rounds scales and minima on their own, each to its nearest integer; step 3 gets
back most of what that rounding costs.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.exact import apart
from qjax.formats.levels import Integers
from qjax.formats.protocol import Scales
from qjax.formats.stores import Multiple
from qjax.formats.superblock import ByReciprocal, by_chunks, keep, once, reciprocal, squares, store, unless_beyond

# Neighbours (scale, minimum): raising both keeps the range's lower end in place, so the grid is a hexagonal one.
NEAR = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
WIDE = (*NEAR, (2, 1), (-2, -1), (1, 2), (-1, -2), (1, -1), (-1, 1))
WIDEST = (*WIDE, (2, 2), (-2, -2), (2, 0), (-2, 0), (0, 2), (0, -2))


@dataclasses.dataclass(frozen=True)
class Affine:
    """How hard to look.

    Attributes:
      steps: S, the largest integer scale and minimum.
      ends: trial shares of the range to cut off at either end; all pairs are tried.
      neighbours: integer steps (scale, minimum) tried around the nearest integers.
      rounds: integer searches, with a refit of d and dmin between them.
    """

    steps: int
    ends: tuple[float, ...]
    neighbours: tuple[tuple[int, int], ...]
    rounds: int = 2


def search_affine(x: Array, v: Array | None, top: int, how: Affine) -> tuple[Array, Array, Array, Array]:
    """The best scales and minima found.

    Args:
      x: f32[sub, J, N].
      v: importance like x, or None for 1.
      top: Q, the largest code.
      how: the search's size.

    Returns: d f32[N], dmin f32[N] (both fp16 numbers), sc u8[J, N], mn u8[J, N].
    """
    totals = _totals(x, v)
    s, m = _real(x, v, totals, top, how)
    d, dmin = store(jnp.max(s, axis=0) / how.steps), store(jnp.max(m, axis=0) / how.steps)
    sc, mn = _integer(s, d, how), _integer(m, dmin, how)

    def one_round(_: Array, state: tuple[tuple[Array, ...], tuple[Array, ...]]) -> tuple:
        best, (d, dmin, sc, mn) = state
        e, sc, mn = _neighbours(x, v, d, dmin, sc, mn, top, how)
        now = (jnp.sum(e, axis=0), d, dmin, sc, mn)
        best = keep(now[0] < best[0], now, best)
        return best, (*_refit(x, v, totals, d, dmin, sc, mn, top), sc, mn)

    first = (jnp.full_like(d, jnp.inf), d, dmin, sc, mn)
    (_, *found, sc, mn), _ = lax.fori_loop(0, how.rounds, one_round, (first, first[1:]))
    d, dmin = unless_beyond(d, found[0]), unless_beyond(dmin, found[1])
    return d, dmin, sc.astype(jnp.uint8), mn.astype(jnp.uint8)


def _real(x: Array, v: Array | None, totals: tuple[Array, Array], top: int, how: Affine) -> tuple[Array, Array]:
    """Step 1: real scales and minima f32[J, N]."""
    low, high = jnp.minimum(jnp.min(x, axis=0), 0.0), jnp.max(x, axis=0)
    span = jnp.maximum(high - low, 0.0)
    pairs = [(a, b) for a in how.ends for b in how.ends]
    cut = jnp.asarray([*pairs, (0.0, 0.0)], jnp.float32)

    def trial(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        start = low + span * cut[i, 0]
        above = jnp.maximum(start, 0.0)  # no minimum is positive: such a cut lengthens the other end instead
        start = start - above
        s, m = (high - span * cut[i, 1] + 0.4 * above - start) / top, -start
        last = i == len(pairs)  # the last trial polishes the best
        moments = _moments(x, v, jnp.where(last, best[1], s), jnp.where(last, best[2], m), top)
        new = _solve(*totals, *moments)
        return keep(new[0] < best[0], new, best)

    first = (jnp.full_like(low, jnp.inf), span / top, -low)
    _, s, m = lax.fori_loop(0, len(pairs) + 1, trial, first)
    return s, m


def _codes(x: Array, s: Array, m: Array, top: int) -> Array:
    inverse = reciprocal(s)
    inverse, offset = once(inverse, m * inverse)
    return jnp.round(jnp.clip(x * inverse[None] + offset[None], 0, top))


def _moments(x: Array, v: Array | None, s: Array, m: Array, top: int) -> tuple[Array, ...]:
    """sum v q, sum v q^2, sum v q x over elements, with the codes of (s, m): f32[J, N] each."""
    q = _codes(x, s, m, top)
    vq = q if v is None else v * q
    return once(jnp.sum(vq, axis=0), jnp.sum(vq * q, axis=0), jnp.sum(vq * x, axis=0))


def _totals(x: Array, v: Array | None) -> tuple[Array, Array]:
    """sum v and sum v x over elements: f32[J, N] each."""
    if v is None:
        return jnp.full(x.shape[1:], x.shape[0], jnp.float32), jnp.sum(x, axis=0)
    return jnp.sum(v, axis=0), jnp.sum(v * x, axis=0)


def _solve(one: Array, sx: Array, q: Array, qq: Array, qx: Array) -> tuple[Array, ...]:
    """The least-squares (error - sum v x^2, scale, minimum) for given codes, the minimum not negative."""
    det = one * qq - q * q
    inverse = reciprocal(det)
    s, t = (one * qx - sx * q) * inverse, (qq * sx - q * qx) * inverse
    s, t = jnp.where(t > 0, qx * reciprocal(qq), s), jnp.minimum(t, 0.0)
    e = s * (s * qq + 2 * (t * q - qx)) + t * (t * one - 2 * sx)
    return once(jnp.where((det > 1e-6 * one * qq) & (s > 0), e, jnp.inf), s, -t)


def _integer(s: Array, d: Array, how: Affine) -> Array:
    return jnp.clip(jnp.round(s * reciprocal(d)[None]), 0, how.steps)


def _neighbours(
    x: Array, v: Array | None, d: Array, dmin: Array, sc: Array, mn: Array, top: int, how: Affine
) -> tuple[Array, ...]:
    """The best (error, sc, mn) near (sc, mn), for given d and dmin: f32[J, N] each."""
    moves = jnp.asarray(how.neighbours, jnp.float32)

    def trial(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        # where minima hardly matter, what moves them also looks farther along the scales
        step = moves[i, 0] + jnp.where(dmin < d * (top / 32), 3 * moves[i, 1], 0.0)[None]
        a, b = jnp.clip(sc + step, 0, how.steps), jnp.clip(mn + moves[i, 1], 0, how.steps)
        s, m = a * d[None], b * dmin[None]
        inverse = reciprocal(s)
        s, m, inverse, offset = once(s, m, inverse, m * inverse)
        q = jnp.round(jnp.clip(x * inverse[None] + offset[None], 0, top))
        e = squares(x + m[None] - s[None] * q, v)
        return keep(e < best[0], (e, a, b), best)

    return lax.fori_loop(0, len(how.neighbours), trial, (jnp.full_like(sc, jnp.inf), sc, mn))


def _refit(
    x: Array,
    v: Array | None,
    totals: tuple[Array, Array],
    d: Array,
    dmin: Array,
    sc: Array,
    mn: Array,
    top: int,
) -> tuple[Array, Array]:
    """Least squares for (d, dmin), given the integers and the codes they lead to."""
    q, qq, qx = _moments(x, v, sc * d[None], mn * dmin[None], top)
    one, sx = totals
    aa, bb, ab = (jnp.sum(t, axis=0) for t in (sc * sc * qq, mn * mn * one, sc * mn * q))
    ax, bx = jnp.sum(sc * qx, axis=0), jnp.sum(mn * sx, axis=0)
    det = aa * bb - ab * ab
    inverse = reciprocal(det)
    new_d, new_m = (ax * bb - ab * bx) * inverse, (ax * ab - aa * bx) * inverse
    alone = (det <= 1e-6 * aa * bb) | (new_m < 0)
    return store(jnp.where(alone, ax * reciprocal(aa), new_d)), store(jnp.where(alone, 0.0, new_m))


@dataclasses.dataclass(frozen=True)
class AffineScales(ByReciprocal):
    """s = d sc, m = -dmin mn: {"d", "dmin": f32[*b, n / 256], fp16 numbers; "sc", "mn": u8[*b, n / 256, 256 / sub]}."""

    how: Affine
    sub: int
    block: int = 256

    @property
    def scale(self) -> Multiple:
        return Multiple("sc", "d", 0, self.how.steps)

    @property
    def offset(self) -> Multiple:
        return Multiple("mn", "dmin", 0, self.how.steps, sign=-1)

    def fit(self, levels: Integers, w: Array, weight: Array | None) -> Scales:
        """The scales of least squared error found."""
        found = by_chunks(lambda x, v: search_affine(x, v, levels.high, self.how), w, weight, self.block, self.sub)
        return dict(zip(("d", "dmin", "sc", "mn"), found, strict=True))

    def weights(self, scales: Scales, T: Array) -> Array:
        """Each product rounded as ggml's C rounds it."""
        s, m = self.scale.get(scales)[..., None], self.offset.get(scales)[..., None]
        return apart(s * T, jnp.inf) + apart(m, jnp.inf)
