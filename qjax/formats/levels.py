"""Levels: the values that codes take, in units of the scale.

    T, code = round(u)        T = value(code) is the level nearest to u

    Integers(-8, 7)           -8 ... 7;  half: -7.5 ... 7.5, half-integers as many
    Table((-1.0, 0.0, 3.0))   a fixed list;  which of two levels takes a tie is the format's to say
    SignMagnitude((0, 1, 3))  0, 1, 3, -1, -3 with the sign in a bit of its own, ties to the smaller

Elementwise, jittable, and the same bits in every program: comparisons and roundings of u, no search.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.typing import Array, Float, Integer


@runtime_checkable
class Levels(Protocol):
    """A frozen record; see the module docstring."""

    def round(self, u: Float[Array, "*u"]) -> tuple[Float[Array, "*u"], Integer[Array, "*u"]]:
        """The level nearest to each u, and its code."""

    def value(self, codes: Integer[Array, "*u"]) -> Float[Array, "*u"]:
        """The levels of codes."""


@dataclasses.dataclass(frozen=True)
class Integers:
    """low ... high, ties to even; `half` puts levels between them: code + 1/2, and u goes to the middle of its cell.

    Codes are int8 where low is negative, else uint8.
    """

    low: int
    high: int
    half: bool = False

    def round(self, u: Float[Array, "*u"]) -> tuple[Float[Array, "*u"], Integer[Array, "*u"]]:
        whole = jnp.floor(u) if self.half else lax.round(u, lax.RoundingMethod.TO_NEAREST_EVEN)
        q = jnp.clip(whole, self.low, self.high)
        return (q + 0.5 if self.half else q), q.astype(self.dtype)

    def value(self, codes: Integer[Array, "*u"]) -> Float[Array, "*u"]:
        q = codes.astype(jnp.float32)
        return q + 0.5 if self.half else q

    @property
    def dtype(self) -> Any:
        return jnp.int8 if self.low < 0 else jnp.uint8

    @property
    def bits(self) -> int:
        """Of a code, where all of them are used."""
        return (self.high - self.low).bit_length()


@dataclasses.dataclass(frozen=True)
class Table:
    """A list of levels, by code. Codes are uint8.

    Attributes:
      values: the level of each code, in float32; a value that stands twice is given the first of its codes.
      up: a tie goes to the upper level, else to the lower; the border is the float32 middle of two levels.
    """

    values: tuple[float | int, ...]
    up: bool = False

    def round(self, u: Float[Array, "*u"]) -> tuple[Float[Array, "*u"], Integer[Array, "*u"]]:
        order, levels = self.order, self.ascending
        t, at = jnp.full(u.shape, levels[0], jnp.float32), jnp.full(u.shape, order[0], jnp.uint8)
        for middle, level, code in zip(self.middles, levels[1:], order[1:], strict=True):
            # A chain of vector comparisons: a binary search or a gather would not vectorize.
            above = u >= middle if self.up else u > middle
            t, at = jnp.where(above, level, t), jnp.where(above, code, at)
        return t, at

    def value(self, codes: Integer[Array, "*u"]) -> Float[Array, "*u"]:
        return jnp.asarray(self.values, jnp.float32)[codes.astype(jnp.int32)]

    @property
    def order(self) -> np.ndarray:
        """The codes of the distinct levels, by value."""
        return np.unique(np.asarray(self.values, np.float32), return_index=True)[1].astype(np.uint8)

    @property
    def ascending(self) -> np.ndarray:
        """The distinct levels, f32."""
        return np.unique(np.asarray(self.values, np.float32))

    @property
    def middles(self) -> np.ndarray:
        """Half way between each two levels, f32."""
        levels = self.ascending
        return (levels[:-1] + levels[1:]) / np.float32(2)


@dataclasses.dataclass(frozen=True)
class SignMagnitude:
    """Magnitudes from 0 up, and their negatives, whose code has the next bit set; ties to the smaller.

    Codes are uint8; zero has no sign.
    """

    magnitudes: tuple[float | int, ...]

    def round(self, u: Float[Array, "*u"]) -> tuple[Float[Array, "*u"], Integer[Array, "*u"]]:
        size, code = jnp.zeros_like(u), jnp.zeros(u.shape, jnp.uint8)
        for a, b in itertools.pairwise(self.magnitudes):
            above = jnp.abs(u) > jnp.float32((a + b) / 2)
            size, code = size + jnp.where(above, jnp.float32(b - a), jnp.float32(0)), code + above.astype(jnp.uint8)
        return jnp.sign(u) * size, jnp.where((u < 0) & (code > 0), code | self.sign, code)

    def value(self, codes: Integer[Array, "*u"]) -> Float[Array, "*u"]:
        size, at = jnp.zeros(codes.shape, jnp.float32), codes & (self.sign - 1)
        for k, (a, b) in enumerate(itertools.pairwise(self.magnitudes)):  # a gather would not vectorize
            size = size + jnp.where(at > k, jnp.float32(b - a), jnp.float32(0))
        return jnp.where((codes & self.sign) > 0, 0.0 - size, size)

    @property
    def sign(self) -> int:
        """The bit of the sign; magnitudes are as many, a power of two."""
        return len(self.magnitudes)
