"""QuIP#'s codes of eight numbers: E8P12, 65,536 points of E8 + 1/4, and what is added to them at 3 and 4 bits.

    p = +- a_1 ... +- a_8 + 1/4 or - 1/4      a one of 256 in {1/2, 3/2, 5/2}^8, an even sum of the signed coordinates

The 256: all 227 of |a|^2 <= 10, and the first 29 of the 56 with five 3/2 and three 1/2 (|a|^2 = 12), by the places of
their 3/2; in lexicographic order, the 29 behind the 227. The last coordinate of those of odd sum is negative in the
table, and an even number of signs changes. Bytes of a point: which a; and the changes, bit i of coordinate i, with bit
0 turned where 1/4 is subtracted: the parity of the byte says so.

    E8P_3   p + 251/512 r       r one of 256: 0, the 240 shortest of E8, and 15 of its 2 e_i, - 2 e_i
    E8P_4   p + 297/1024 p'     p' another such point

Source: QuIP#, arXiv:2402.04396, sections 4.2, 4.3 and appendix C. The paper leaves the choice of the 29 and the 15 to
its code; these here are as good for normal weights and not the same, so files of the two do not mix.
"""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.protocol import Tile
from qjax.formats.vectors import e8_search
from qjax.formats.vectors.grid import VectorCode
from qjax.typing import Array, Float, UInt8


@cache
def magnitudes() -> np.ndarray:
    """The 256 a, f32[256, 8], all positive."""
    short = [a for a in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(x * x for x in a) <= 10]
    places = itertools.islice(itertools.combinations(range(8), 5), 29)
    return np.array(short + [tuple(1.5 if i in at else 0.5 for i in range(8)) for at in places], np.float32)


@cache
def table() -> np.ndarray:
    """The 256 a with the last coordinate negative where their sum is odd, f32[256, 8]."""
    a = magnitudes().copy()
    a[:, 7] *= 1 - 2 * (a.sum(axis=1) % 2)
    return a


@cache
def ball() -> np.ndarray:
    """256 points of E8 about the origin: 0, the 240 of norm 2, and 15 of norm 4; f32[256, 8]."""
    whole = [p for p in itertools.product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, p)) == 2]
    half = [p for p in itertools.product((-0.5, 0.5), repeat=8) if sum(p) % 2 == 0]
    axes = np.concatenate([2 * np.eye(8), -2 * np.eye(8)])[:15]
    return np.concatenate([np.zeros((1, 8)), whole, half, axes]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class E8P:
    """E8P12; see the module's docstring."""

    tile: Tile = (1, 8)
    bits: int = 2
    spread: float = 1.03

    def nearest(
        self, u: Float[Array, "*c 1 8"], rows: Float[Array, "*c 1"], metric: Float[Array, "8 8"] | None
    ) -> tuple[Float[Array, "*c 1 8"], UInt8[Array, "*c 1 2"]]:
        q, minus = e8_search.nearest(u.reshape(-1, 8).T, metric, magnitudes())
        codes = _bytes_of(q, minus)
        return (q + (0.25 - 0.5 * minus)[None]).T.reshape(u.shape), codes.reshape(*u.shape[:-1], 2)

    def points(self, codes: UInt8[Array, "*c 1 2"]) -> Float[Array, "*c 1 8"]:
        which, changes = codes[..., 0], codes[..., 1]
        minus = lax.population_count(changes) & jnp.uint8(1)
        bits = _bit(changes ^ minus)
        return jnp.asarray(table())[which] * (1.0 - 2.0 * bits) + (0.25 - 0.5 * minus.astype(jnp.float32))[..., None]


@dataclasses.dataclass(frozen=True)
class Ball:
    """The 256 points of `ball`, one byte each."""

    tile: Tile = (1, 8)
    bits: int = 1
    spread: float = 1.0

    def nearest(
        self, u: Float[Array, "*c 1 8"], rows: Float[Array, "*c 1"], metric: Float[Array, "8 8"] | None
    ) -> tuple[Float[Array, "*c 1 8"], UInt8[Array, "*c 1 1"]]:
        codes = e8_search.of_table(u.reshape(-1, 8).T, metric, ball()).reshape(*u.shape[:-1], 1)
        return self.points(codes), codes

    def points(self, codes: UInt8[Array, "*c 1 1"]) -> Float[Array, "*c 1 8"]:
        return jnp.asarray(ball())[codes[..., 0]]


@dataclasses.dataclass(frozen=True)
class Residual:
    """The nearest point of one code, and of another the nearest to what it leaves: p + fine p'.

    `fine` has few binary digits, so that the sum is exact however a compiler adds it up.
    """

    first: VectorCode
    second: VectorCode
    fine: float
    spread: float

    @property
    def tile(self) -> Tile:
        return self.first.tile

    @property
    def bits(self) -> int:
        return self.first.bits + self.second.bits

    def nearest(
        self, u: Float[Array, "*c r k"], rows: Float[Array, "*c r"], metric: Float[Array, "k k"] | None
    ) -> tuple[Float[Array, "*c r k"], UInt8[Array, "*c r j"]]:
        p, code = self.first.nearest(u, rows, metric)
        r, finer = self.second.nearest((u - p) * (1.0 / self.fine), rows, metric)
        return p + r * self.fine, jnp.concatenate([code, finer], axis=-1)

    def points(self, codes: UInt8[Array, "*c r j"]) -> Float[Array, "*c r k"]:
        cut = self.first.bits * self.tile[1] // 8
        return self.first.points(codes[..., :cut]) + self.second.points(codes[..., cut:]) * self.fine


@cache
def _numbers() -> np.ndarray:
    """Which of `magnitudes` has the digits |q| - 1/2 to base 3, u8[3^8]."""
    found = np.zeros(3**8, np.uint8)
    found[((magnitudes() - 0.5) @ (3 ** np.arange(8))).astype(int)] = np.arange(256)
    return found


def _bytes_of(q: Float[Array, "8 N"], minus: Float[Array, "N"]) -> UInt8[Array, "N 2"]:
    digits = (jnp.abs(q) - 0.5).astype(jnp.int32) * (3 ** jnp.arange(8, dtype=jnp.int32))[:, None]
    which = jnp.asarray(_numbers())[jnp.sum(digits, axis=0)]
    changed = (q < 0) != (jnp.asarray(table())[which].T < 0)
    byte = jnp.sum(jnp.where(changed, _places()[:, None], jnp.uint8(0)), axis=0, dtype=jnp.uint8)
    return jnp.stack([which, byte ^ minus.astype(jnp.uint8)], axis=-1)


def _places() -> UInt8[Array, "8"]:
    return jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8)


def _bit(byte: UInt8[Array, "*b"]) -> Float[Array, "*b 8"]:
    """The bits of a byte, the lowest first."""
    places = jnp.arange(8, dtype=jnp.uint8).reshape((1,) * byte.ndim + (8,))
    return ((byte[..., None] >> places) & 1).astype(jnp.float32)
