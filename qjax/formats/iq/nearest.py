"""The nearest of many points to each tile, by halves.

    sum v (x - s T)^2 - sum v x^2  =  s (s sum v g^2 - 2 sum v |x| g)  =  s (L[left half] + R[right half])

A half of four weights of three levels has 81 values, of two weights of eight 64: their sums are made once for a tile,
whatever its scale. Each of the 256 ... 2048 vectors then costs one addition and one comparison, for many tiles at once.

Signs are those of the weights. Where an even number must be negative and is not, one sign is wrong, which costs
4 s v_i |x_i| g_i more for the best i of the vector that is chosen: min(L', R') in the same way, so that vector and sign
are chosen together (ggml turns the sign of the least v x^2 before it looks at vectors).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.iq.points import Points
from qjax.typing import Array, Float, Int, Integer

_AT_ONCE = 4  # vectors that one step of the loop looks at

Best = tuple[Array, Array]
"""Cost f32[*N] and which i32[*N]."""
Halves = tuple[Array, Array]
"""What a sum, or a least, is for each value of the left half and of the right: f32[m^(k / 2), *N] each."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A vector's share of a tile, for every scale: sums of v g^2 and 2 v |x| g, the least 4 v |x| g, each v |x| g."""

    squares: Halves
    products: Halves
    least: Halves | None
    each: Float[Array, "m k *N"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of weights, ready for every scale.

    Attributes:
      points: what they are rounded to.
      parts: for each shift, of each vector.
      negative: signs, bool[tile, *N], where points have some.
      odd: whether one of them is wrong, bool[*N].
    """

    points: Points
    parts: list[list[Part]]
    negative: Any
    odd: Any


def tiles(points: Points, x: Float[Array, "tile *N"], v: Float[Array, "tile *N"] | None) -> Tiles:
    """Tiles of weights x with importance v, None for 1."""
    signed = points.signs != "none"
    size = jnp.abs(x) if signed else x
    negative = x < 0 if signed else None
    odd = jnp.sum(x < 0, axis=0) % 2 == 1 if points.signs == "even" else None

    vx = size if v is None else v * size

    def part(p: int, shift: float) -> Part:
        at = slice(p * points.length, (p + 1) * points.length)

        def of_level(level: Array) -> tuple[Array, Array]:
            return level * vx[at], jnp.broadcast_to(level * level * (1.0 if v is None else v[at]), vx[at].shape)

        # a loop, for XLA would compute it again for each of the sums
        each, squares = lax.map(of_level, jnp.asarray(points.levels + np.float32(shift)))
        least = None if odd is None else _halves(jnp.where(odd[None, None], 4.0 * each, 0.0), jnp.minimum)
        return Part(_halves(squares, jnp.add), _halves(2.0 * each, jnp.add), least, each)

    return Tiles(points, [[part(p, a) for p in range(points.parts)] for a in points.shifts], negative, odd)


def nearest(of: Tiles, s: Float[Array, "*s"]) -> tuple[Float[Array, "*N"], Integer[Array, "*N"]]:
    """The code of least sum v (x - s T)^2 for each tile, exactly.

    Args:
      s: the scale of each tile, not negative; it may broadcast.

    Returns: sum v (x - s T)^2 - sum v x^2, and the codes. What is not asked for is not computed.
    """
    e, code = reduce(_smaller, (_nearest(of, s, k) for k in range(len(of.parts))))
    return s * e, code


def _nearest(of: Tiles, s: Array, shift: int) -> Best:
    found = [_least(of.points, part, s) for part in of.parts[shift]]
    plain, wrong = ([f[k] for f in found] for k in (0, 1))
    if of.odd is None:
        return _total(plain), of.points.code([k for _, k in plain], shift, of.negative)
    ways = []
    for p, part in enumerate(of.parts[shift]):  # the part whose sign is wrong, if one is
        best = [*plain[:p], wrong[p], *plain[p + 1 :]]
        place = _cheapest(of.points, wrong[p][1], part.each) + p * of.points.length
        here = of.odd[None] & (lax.broadcasted_iota(place.dtype, of.negative.shape, 0) == place[None])
        ways.append((_total(best), of.points.code([k for _, k in best], shift, of.negative ^ here)))
    return reduce(_smaller, ways)


def _least(points: Points, part: Part, s: Array) -> tuple[Best, Best]:
    """The best vector, and the best where one sign is wrong: cost over s, and which."""
    left, right, order = points.halves
    at = [jnp.asarray(a.reshape(-1, _AT_ONCE)) for a in (left, right, order)]
    L, R = (s[None] * q - x for q, x in zip(part.squares, part.products, strict=True))
    turned = part.least

    def step(i: Array, best: tuple[Best, Best]) -> tuple[Best, Best]:
        plain, wrong = best
        for j in range(_AT_ONCE):
            a, b, k = (x[i, j] for x in at)
            e = _row(L, a) + _row(R, b)
            plain = _smaller(plain, (e, k))
            if turned is not None:
                wrong = _smaller(wrong, (e + jnp.minimum(_row(turned[0], a), _row(turned[1], b)), k))
        return plain, wrong

    lanes = L.shape[1:]
    none = jnp.full(lanes, jnp.inf, jnp.float32), jnp.zeros(lanes, jnp.int32)
    return lax.fori_loop(0, len(order) // _AT_ONCE, step, (none, none))


def _halves(c: Float[Array, "m k *N"], combined: Callable[[Array, Array], Array]) -> Halves:
    def one(part: Array) -> Array:
        out = part[:, 0]
        for i in range(1, part.shape[1]):
            out = combined(out[:, None], part[None, :, i]).reshape(-1, *part.shape[2:])
        return out

    half = c.shape[1] // 2
    return one(c[:, :half]), one(c[:, half:])


def _cheapest(points: Points, index: Int[Array, "*N"], each: Float[Array, "m k *N"]) -> Int[Array, "*N"]:
    """Which sign of the vector that was chosen costs least when wrong."""
    level = jnp.moveaxis(jnp.asarray(points.digits)[index], -1, 0)  # [k, *N]
    of_level = each[0]
    for m in range(1, len(each)):
        of_level = jnp.where(level == m, each[m], of_level)
    return jnp.argmin(of_level, axis=0)


def _row(a: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(a, i, 0, keepdims=False)


def _total(parts: list[Best]) -> Array:
    return reduce(jnp.add, (e for e, _ in parts))


def _smaller(a: Best, b: Best) -> Best:
    better = b[0] < a[0]
    return jnp.where(better, b[0], a[0]), jnp.where(better, b[1], a[1])
