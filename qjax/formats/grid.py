"""The format of most families: Levels x Scaling x Layout, and all that follows from the three.

    w_hat = s T + m        T = level((w - m) / s)        Grid("Q4_0", Integers(-8, 7), OneScale(...), Blocks(...))

levels.py says which values codes take, a `Scaling` how s and m are found and stored, a `Layout` how bits lie in memory.
What a rounding asks of a format (`columns`, `round`, `basis`: protocol.py) is derived here once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax.numpy as jnp

from qjax.chain import Link
from qjax.formats.fields import Blocks
from qjax.formats.levels import Levels
from qjax.formats.protocol import Columns, Leaves, Scales, Tile
from qjax.formats.storage import over
from qjax.formats.stores import Store
from qjax.typing import Array, Float, Integer


@runtime_checkable
class Layout(Protocol):
    """How scales and codes become the packed leaves of a tensor, and back."""

    @property
    def bits(self) -> float:
        """Bits stored for a weight, scales included, padding and what is stored once for a row or tensor not."""

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        """The stored leaves."""

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        """The exact inverse of `pack`."""

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        """(*b, n), from the leaves' shapes alone."""


class Scaling:
    """How scales are found, stored and used: a frozen record. What it does not say of itself is as it stands here.

    Attributes:
      block: weights that share scales, super-scales included; 0: the row.
      scale: how s is stored.
      offset: how m is; or
      zero: how z is, where m = -s z.
    """

    if TYPE_CHECKING:  # fields of some, properties of others

        @property
        def block(self) -> int: ...

        @property
        def scale(self) -> Store: ...

        @property
        def offset(self) -> Store | None: ...

        @property
        def zero(self) -> Store | None: ...

    else:
        offset = zero = None

    @property
    def rows(self) -> int:
        """Rows that go together: 1: each stands alone; 0: all rows of a matrix."""
        return 1

    def fit(self, levels: Any, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None) -> Scales:
        """Scales for w, as stored."""
        raise NotImplementedError

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        """s and m, f32[*b, G] each; no m where levels have no offset."""
        s = self.scale.get(scales)
        if self.zero is not None:
            return s, -s * self.zero.get(scales)
        return s, None if self.offset is None else self.offset.get(scales)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        """The storable scales nearest to s and m; super-scales stay."""
        if m is None:
            m = self.columns(scales, s.shape)[1]
        new = scales | self.scale.put(scales, s if self.signed else jnp.maximum(s, 0.0))
        if m is None:
            return new
        if self.offset is not None:
            return new | self.offset.put(new, m)
        return new | self.zeros(new, m)

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        """`scales` with every group's own number, or numbers, replaced by one nearby; none where rows share it."""
        if not self.rows:
            return ()
        stores = [store for store in (self.scale, self.offset, self.zero) if store is not None]
        moves = itertools.product(*(({}, *store.neighbours(scales)) for store in stores))
        return tuple(functools.reduce(operator.or_, move, scales) for move in moves)[1:]

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative."""
        return True

    def zeros(self, scales: Scales, m: Array) -> Scales:
        """z of an offset, for the scale as stored: -m / s, 0 where s is."""
        assert self.zero is not None
        return self.zero.put(scales, over(-m, self.scale.get(scales)))

    def units(self, scales: Scales, x: Float[Array, "*b G g"]) -> Float[Array, "*b G g"]:
        """(x - m) / s with one division, 0 where s is."""
        s = self.scale.get(scales)[..., None]
        x = x if self.offset is None else x - self.offset.get(scales)[..., None]
        u = over(x, s)
        return u if self.zero is None else u + self.zero.get(scales)[..., None]

    def weights(self, scales: Scales, T: Float[Array, "*b G g"]) -> Float[Array, "*b G g"]:
        """s T + m, or s (T - z): one rounding each, and no s T - s z for a compiler to fuse."""
        s = self.scale.get(scales)[..., None]
        if self.zero is not None:
            return s * (T - self.zero.get(scales)[..., None])
        return s * T if self.offset is None else s * T + self.offset.get(scales)[..., None]

    def nearest(self, levels: Any, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        """The code of the level nearest to each weight."""
        return levels.round(self.units(scales, self.grouped(scales, w)))[1].reshape(w.shape)

    def decode(self, levels: Any, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        """The value of each code."""
        return self.weights(scales, levels.value(self.grouped(scales, codes))).reshape(codes.shape)

    def encode(
        self, levels: Any, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None
    ) -> tuple[Scales, Integer[Array, "*b n"]]:
        """`fit` and `nearest`, unless the format's reference encoder does something else."""
        scales = self.fit(levels, w, weight)
        return scales, self.nearest(levels, scales, w)

    def grouped(self, scales: Scales, x: Array) -> Array:
        """[*b, n] -> [*b, G, g]: the weights under each s."""
        return x.reshape(*x.shape[:-1], self.columns(scales, x.shape)[0].shape[-1], -1)


class Scaled(Link):
    """What a format has of its scaling and of its layout alone, whatever is scaled."""

    scaling: Scaling
    layout: Layout

    @property
    def block(self) -> int:
        return self.scaling.block

    @property
    def rows(self) -> int:
        return self.scaling.rows

    @property
    def bits_per_weight(self) -> float:
        return self.layout.bits

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> Columns:
        return self.scaling.columns(scales, shape)

    def store(self, scales: Scales, columns: Columns) -> Scales:
        s, m = columns
        assert s is not None
        return self.scaling.store(scales, s, m)

    def neighbours(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Columns, ...]:
        return tuple(self.scaling.columns(near, shape) for near in self.scaling.neighbours(scales))

    def pack(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Leaves:
        return self.layout.pack(scales, codes)

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b m"]]:
        return self.layout.unpack(leaves)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return self.layout.shape(leaves)


@dataclasses.dataclass(frozen=True)
class Grid(Scaled):
    """Single levels times scales; see the module's docstring. Two are equal when their parts are."""

    name: str
    levels: Levels
    scaling: Scaling
    layout: Layout
    about: str = ""

    @property
    def tile(self) -> Tile:
        return 1, 1

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        return self.scaling.fit(self.levels, w, weight)

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        return self.scaling.nearest(self.levels, scales, w)

    def decode(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        return self.scaling.decode(self.levels, scales, codes)

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b n"]]:
        return self.scaling.encode(self.levels, w, weight)

    def level(self, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        return self.levels.round(u)[0]

    def round(
        self, columns: Columns, target: Float[Array, "*c 1 1"], metric: Array | None = None
    ) -> tuple[Float[Array, "*c 1 1"], Integer[Array, "*c 1 1"]]:
        s, m = columns[0][..., None], None if columns[1] is None else columns[1][..., None]
        u = target if m is None else target - m
        T, code = self.levels.round(jnp.where(s == 0, 0.0, u / jnp.where(s == 0, 1.0, s)))
        return (s * T if m is None else s * T + m), code

    def basis(self, codes: Integer[Array, "*b n"]) -> tuple[Array, ...]:
        return (self.levels.value(codes),)


@dataclasses.dataclass(frozen=True)
class GGML(Grid):
    """A type of ggml's: a Grid whose layout is a file's blocks."""

    layout: Blocks

    @property
    def ggml_type(self) -> int:
        """The type's number in a GGUF file."""
        return self.layout.ggml_type

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return self.layout.size
