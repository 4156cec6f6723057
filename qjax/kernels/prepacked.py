"""Packed weights in the layout that a kernel reads, made once at load: their own format, but for its leaves.

    Prepacked(format, layout)     leaves {"packed": layout.prepack(format, leaves)}, turned back by layout.unpack

A tensor of such a format decodes, counts its bits and is multiplied with as before; a kernel of that layout takes the
leaves as they are, any other has them turned back within its program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from qjax.formats.protocol import Columns, Format, Leaves, Scales, Tile
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kernel has packed weights lie.

    Attributes:
      name: in messages.
      prepack: (format, leaves) -> a pytree of arrays, of weights [*b, out, n].
      unpack: its inverse, bit for bit.
      shape: of such a tree, from shapes alone: (*b, out, n).
    """

    name: str
    prepack: Callable[[Format, Leaves], Any]
    unpack: Callable[[Any], Leaves]
    shape: Callable[[Any], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Prepacked:
    """A format whose leaves lie as a kernel reads them; all else is the format's own."""

    of: Format
    layout: Layout

    @property
    def name(self) -> str:
        return f"{self.of.name} ({self.layout.name})"

    @property
    def block(self) -> int:
        return self.of.block

    @property
    def tile(self) -> Tile:
        return self.of.tile

    @property
    def rows(self) -> int:
        """0: those of a matrix lie together, padded and turned."""
        return 0

    @property
    def bits_per_weight(self) -> float:
        return self.of.bits_per_weight

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        return self.of.fit(w, weight)

    def nearest(self, scales: Scales, w: Array) -> Array:
        return self.of.nearest(scales, w)

    def decode(self, scales: Scales, codes: Array) -> Array:
        return self.of.decode(scales, codes)

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        return self.of.encode(w, weight)

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> Columns:
        return self.of.columns(scales, shape)

    def round(self, columns: Columns, target: Array, metric: Array | None = None) -> tuple[Array, Array]:
        return self.of.round(columns, target, metric)

    def basis(self, codes: Array) -> tuple[Array, ...]:
        return self.of.basis(codes)

    def store(self, scales: Scales, columns: Columns) -> Scales:
        return self.of.store(scales, columns)

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        return {"packed": self.layout.prepack(self.of, self.of.pack(scales, codes))}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        return self.of.unpack(self.layout.unpack(leaves["packed"]))

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return self.layout.shape(leaves["packed"])


def bare(format: Format) -> Format:
    """The format without a layout of its own."""
    return format.of if isinstance(format, Prepacked) else format


def laid_out(layout: Layout | None, format: Format, leaves: Leaves) -> Any:
    """What a kernel of a layout reads: the leaves as they are, if they lie so; else brought into it here.

    Args:
      layout: the kernel's; None: leaves as the format itself packs them.
      format: of the leaves.
      leaves: of weights.
    """
    if isinstance(format, Prepacked):
        packed = leaves["packed"]
        if format.layout == layout:
            return packed
        leaves = format.layout.unpack(packed)
    return leaves if layout is None else layout.prepack(bare(format), leaves)
