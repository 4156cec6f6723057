"""Scales of a block of 256 weights: small odd numbers under one fp16 number, found where their points are.

    minimize over d, sc   sum_ij v_ij (x_ij - s_j T_ij)^2      s_j = d (2 sc_j + 1) / unit,  T_ij the nearest point

1. For each sub-block the best of a few real scales, which map its largest weight onto a share of the largest level.
2. d, such that the largest of them becomes the largest odd number.
3. For each sub-block the best odd number of a neighbourhood; d by least squares, nearer neighbours; and again.
4. d times sqrt(sum v x^2 / sum v (s T)^2), or as much as makes the squared error 3 % larger: least squares leave the
   points smaller than the weights by as much as they miss, and what all weights lack together costs more than its
   square says where inputs are correlated: tr(E H E^T) of real layers falls by a tenth and more at two bits.

Every trial is judged by its true error, in the metric that is asked for, with the point and all signs chosen for it
(nearest.py). ggml (quantize_row_iq2_xs_impl and its kin) takes real scales, rounds them to odd numbers and keeps, or
looks up again, what it had chosen for the real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import reduce

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.grid import Scaling
from qjax.formats.iq.nearest import nearest, tiles
from qjax.formats.iq.points import Points
from qjax.formats.protocol import Scales
from qjax.formats.storage import quotient
from qjax.formats.stores import next_integers
from qjax.formats.superblock import by_chunks, keep, reciprocal, store, unless_beyond
from qjax.typing import Float

_DEARER = 0.03
_CHUNK = 32  # blocks side by side: the halves' costs stay in cache


@dataclasses.dataclass(frozen=True)
class Odd:
    """v = d (2 sc + 1) / unit, sc from 0 to `high`: `key` u8[*b, B, J], `under` f32[*b, B]."""

    key: str
    under: str
    high: int
    unit: int = 1

    def get(self, scales: Scales) -> Float[Array, "*b G"]:
        d = scales[self.under][..., None] * (1 / self.unit)
        return _flat(d * (2 * scales[self.key].astype(jnp.int32) + 1).astype(jnp.float32))

    def put(self, scales: Scales, v: Float[Array, "*b G"]) -> Scales:
        """The nearest odd numbers; those under a d of 0, which all mean the same, stay."""
        now = scales[self.key]
        d = scales[self.under][..., None] * (1 / self.unit)
        odd = quotient(v.reshape(now.shape), jnp.where(d == 0, 1.0, d))
        sc = jnp.clip(jnp.round((odd - 1.0) * 0.5), 0, self.high).astype(now.dtype)
        return {self.key: jnp.where(d == 0, now, sc)}

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        """The odd numbers before and behind."""
        return next_integers(scales[self.key], self.key, 0, self.high)


@dataclasses.dataclass(frozen=True)
class Shift:
    """m = size s, or -size s where `key` u8[*b, B, J] is 1."""

    key: str
    size: float
    under: Odd

    def get(self, scales: Scales) -> Float[Array, "*b G"]:
        s = self.under.get(scales)
        return s * jnp.where(_flat(scales[self.key]) == 1, -self.size, self.size)

    def put(self, scales: Scales, v: Float[Array, "*b G"]) -> Scales:
        """The nearer of the two; where s is 0 it stays."""
        now = scales[self.key]
        shift = (v.reshape(now.shape) < 0).astype(now.dtype)
        return {self.key: jnp.where(self.under.get(scales).reshape(now.shape) == 0, now, shift)}

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        """The other one."""
        return ({self.key: 1 - scales[self.key]},)


@dataclasses.dataclass(frozen=True)
class How:
    """How hard to look.

    Attributes:
      shares: of the largest level, onto which the largest weight of a sub-block is mapped.
      reach: steps to either side in the first search of a neighbourhood; later ones look one step around.
      rounds: searches behind the first.
    """

    shares: tuple[float, ...]
    reach: int = 4
    rounds: int = 2


@dataclasses.dataclass(frozen=True)
class OddScales(Scaling):
    """{"d": f32[*b, n / 256] (fp16 numbers), "sc": u8[*b, n / 256, 256 / sub]}, and "shift" like sc where there is one.

    Attributes:
      how: the search's size.
      sub: weights under one sc.
      high: of sc.
      unit: what the product is divided by.
      shift: what all points of a sub-block are moved by, either way; 0: nothing.
    """

    how: How
    sub: int
    high: int
    unit: int
    shift: float = 0.0
    block: int = 256

    @property
    def signed(self) -> bool:
        return False

    @property
    def scale(self) -> Odd:
        return Odd("sc", "d", self.high, self.unit)

    @property
    def offset(self) -> Shift | None:
        return Shift("shift", self.shift, self.scale) if self.shift else None

    def fit(self, points: Points, w: Array, weight: Array | None) -> Scales:
        """The scales of least squared error found, d a little larger (4 above)."""

        def search(x: Array, v: Array | None) -> tuple[Array, ...]:
            return search_odd(points, x, v, self)

        names = ("d", "sc", "shift") if self.shift else ("d", "sc")
        return dict(zip(names, by_chunks(search, w, weight, self.block, self.sub, _CHUNK), strict=True))


def search_odd(points: Points, x: Float[Array, "sub J N"], v: Array | None, of: OddScales) -> tuple[Array, ...]:
    """d f32[N] (an fp16 number), sc u8[J, N] and shift like it; v: importance like x, or None for 1."""
    how, high, unit = of.how, of.high, of.unit
    most = jnp.max(jnp.abs(x), axis=0)
    x, v = _planes(points, x), None if v is None else _planes(points, v)
    moved = [dataclasses.replace(points, shifts=(a,)) for a in (of.shift, -of.shift)] if of.shift else [points]
    ready = [tiles(p, x, v) for p in moved]
    energy = jnp.sum(x * x if v is None else v * x * x, axis=(0, 1, 2))

    def error(s: Array) -> Array:
        """sum v (x - s T)^2 - sum v x^2: f32[J, N]."""
        return reduce(jnp.minimum, (jnp.sum(nearest(r, s[None])[0], axis=0) for r in ready))

    def chosen(s: Array) -> tuple[Array, Array]:
        """Which shift, and T, f32[tile, t, J, N]."""
        found = [nearest(r, s[None]) for r in ready]
        T = [jnp.moveaxis(p.value(code[..., None]), -1, 0) for p, (_, code) in zip(moved, found, strict=True)]
        if len(ready) == 1:
            return jnp.zeros(s.shape, bool), T[0]
        first, second = (jnp.sum(e, axis=0) for e, _ in found)
        return second < first, jnp.where((second < first)[None, None], T[1], T[0])

    def best_of(count: Array | int, trial: Callable[[Array], tuple[Array, Array]], start: Array) -> tuple[Array, Array]:
        def one(i: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
            t, s = trial(i)
            e = error(s)
            return keep(e < best[0], (e, t), best)

        return lax.fori_loop(0, count, one, (jnp.full(most.shape, jnp.inf), start))

    def around(d: Array, sc: Array, reach: Array | int) -> tuple[Array, Array]:
        def trial(i: Array) -> tuple[Array, Array]:
            n = jnp.clip(sc + (i - reach).astype(jnp.float32), 0, high)
            return n, (d * (1 / unit))[None] * (2 * n + 1)

        e, sc = best_of(2 * reach + 1, trial, sc)
        return jnp.sum(e, axis=0), sc

    def refit(d: Array, sc: Array) -> Array:
        """Least squares for d, given the odd numbers and the points they lead to."""
        odd = (2 * sc + 1) * (1 / unit)
        T = chosen(d[None] * odd)[1]
        vT = T if v is None else v * T
        tx, tt = (jnp.sum(o * jnp.sum(a, axis=(0, 1)), axis=0) for o, a in ((odd, vT * x), (odd * odd, vT * T)))
        return store(tx * reciprocal(tt))

    shares = jnp.asarray([1 / (a * float(points.levels[-1])) for a in how.shares], jnp.float32)
    _, real = best_of(len(how.shares), lambda i: (most * shares[i],) * 2, most)
    first = store(jnp.max(real, axis=0) * (unit / (2 * high + 1)))
    sc = jnp.clip(jnp.round((real * reciprocal(first)[None] * unit - 1) * 0.5), 0, high)

    def one_round(i: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        _, d, sc = best
        d = lax.cond(i == 0, lambda d, sc: d, refit, d, sc)
        e, sc = around(d, sc, jnp.where(i == 0, how.reach, 1))
        return keep(e < best[0], (e, d, sc), best)

    e, d, sc = lax.fori_loop(0, 1 + how.rounds, one_round, (jnp.full_like(first, jnp.inf), first, sc))
    missed = jnp.maximum(energy * reciprocal(-e) - 1.0, 0.0)  # over what is met
    d = store(d * jnp.minimum(jnp.sqrt(1.0 + missed), 1.0 + jnp.sqrt(_DEARER * missed)))
    d = jnp.where(e < 0, d, 0.0)  # no point is zero: where the least fp16 number is still too coarse, zeros are nearer
    found = unless_beyond(first, d), sc.astype(jnp.uint8)
    if not of.shift:
        return found
    return *found, chosen((d * (1 / unit))[None] * (2 * sc + 1))[0].astype(jnp.uint8)


def _planes(points: Points, x: Float[Array, "sub J N"]) -> Float[Array, "tile t J N"]:
    """The tiles of sub-blocks, a weight of each in every plane."""
    return x.reshape(-1, points.tile, *x.shape[1:]).swapaxes(0, 1)


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)
