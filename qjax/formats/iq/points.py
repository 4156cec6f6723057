"""Points: the vectors that a tile of weights is rounded to, ggml's importance grids.

    T = sigma * (g + delta)        g one of 256 ... 2048 vectors of 4 or 8 levels, sigma its signs, delta a shift of all

    code, from its lowest bit on:   index of each vector | shift, where there are several | signs, 1: negative

Signs are of a bit each, or a bit less for each eight of them ("even": an even number is negative, and the eighth
follows from the seven), or none, where levels have signs of their own.

The vectors were chosen by ggml's author for how often weights come near them, and no rule makes them anew: they are
read from the package `gguf` (`gguf.quants`), as ggml's own tables iq2xxs_grid ... iq1s_grid have them.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, Literal

import gguf
import jax.numpy as jnp
import numpy as np

from qjax.typing import Array, Float, Integer


@dataclasses.dataclass(frozen=True)
class Points:
    """The points of a type.

    Attributes:
      of: the type whose table it is, as gguf names it.
      parts: vectors in a tile.
      signs: "free", "even" or "none".
      shifts: what is added to every level, by the code's bit; (0,): nothing.
    """

    of: str
    parts: int = 1
    signs: Literal["free", "even", "none"] = "free"
    shifts: tuple[float, ...] = (0.0,)

    @property
    def vectors(self) -> np.ndarray:
        """f32[vectors, length]."""
        return _vectors(self.of)

    @property
    def levels(self) -> np.ndarray:
        """The levels that vectors are of, ascending, f32[m]."""
        return np.unique(self.vectors)

    @property
    def length(self) -> int:
        """Weights of a vector."""
        return self.vectors.shape[1]

    @property
    def tile(self) -> int:
        """Weights of a code."""
        return self.parts * self.length

    @property
    def bits(self) -> int:
        """Of an index."""
        return (len(self.vectors) - 1).bit_length()

    @property
    def digits(self) -> np.ndarray:
        """Each vector's levels, by number: i32[vectors, length]."""
        return np.searchsorted(self.levels, self.vectors).astype(np.int32)

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each vector its left half and its right, read as numbers of base m, and its index; by left halves."""
        half, m = self.length // 2, len(self.levels)
        places = (m ** np.arange(half)[::-1]).astype(np.int32)
        left, right = self.digits[:, :half] @ places, self.digits[:, half:] @ places
        order = np.lexsort((right, left)).astype(np.int32)
        return left[order], right[order], order

    @property
    def below_signs(self) -> int:
        """Bits of a code that are no signs."""
        return self.parts * self.bits + (len(self.shifts) - 1).bit_length()

    def value(self, codes: Integer[Array, "*b t"]) -> Float[Array, "*b n"]:
        """T of codes, n = t tile."""
        vectors = jnp.asarray(self.vectors)
        index = (codes[..., None] >> self.starts(codes.ndim)) & (len(vectors) - 1)
        T = vectors[index.astype(jnp.int32)].reshape(*codes.shape, self.tile)
        if len(self.shifts) > 1:
            T = T + jnp.asarray(self.shifts, jnp.float32)[(codes >> self.parts * self.bits) & 1][..., None]
        if self.signs != "none":
            T = jnp.where(self.negative(codes), -T, T)
        return T.reshape(*codes.shape[:-1], -1)

    def negative(self, codes: Integer[Array, "*t"]) -> Array:
        """Which weights of each code's tile are negative, bool[*t, tile]."""
        places = jnp.arange(self.tile, dtype=jnp.uint32).reshape((1,) * codes.ndim + (-1,))
        bits = ((codes >> self.below_signs)[..., None] >> places) & 1
        if self.signs == "even":
            last = jnp.sum(bits[..., :-1], axis=-1, keepdims=True, dtype=jnp.uint32) & 1
            bits = jnp.concatenate([bits[..., :-1], last], axis=-1)
        return bits == 1

    def code(self, index: list[Array], shift: Array | int, negative: Array | None) -> Integer[Array, "*t"]:
        """The inverse of the above.

        Args:
          index: of each part, i32[*t].
          shift: which, i32[*t].
          negative: bool[tile, *t], of even number where that is asked for.
        """
        code = sum((i.astype(jnp.uint32) << (p * self.bits) for p, i in enumerate(index[1:], 1)), _u32(index[0]))
        if len(self.shifts) > 1:
            code = code | (_u32(shift) << (self.parts * self.bits))
        if negative is None:
            return code
        stored = self.tile - (self.signs == "even")
        return code | sum(
            (_u32(negative[i]) << (self.below_signs + i) for i in range(1, stored)),
            _u32(negative[0]) << self.below_signs,
        )

    def starts(self, ndim: int) -> Array:
        """The lowest bit of each part's index, u32[1, ..., 1, parts]."""
        return (self.bits * jnp.arange(self.parts, dtype=jnp.uint32)).reshape((1,) * ndim + (-1,))


def _u32(x: Any) -> Array:
    return jnp.asarray(x).astype(jnp.uint32)


@lru_cache
def _vectors(of: str) -> np.ndarray:
    table = getattr(gguf.quants, of)
    table.init_grid()
    return np.asarray(table.grid, np.float32).reshape(table.grid_shape)
