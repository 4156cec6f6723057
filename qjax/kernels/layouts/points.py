"""The layout of vector codes that the GPU kernels read: the format's own bytes as words, side by side.

    unit    sixteen weights of a row, 2 K bytes = K words of 16 bits, the first byte the high one
    words   u16[*b, N, columns K / 16]        a block of P units: first word of all, second word of all ...

                     P words       P words
        row 0    [ word 0 of units 0 ... P - 1 | word 1 of units 0 ... P - 1 | ... K of them |  units P ... 2 P - 1 ]
        row 1    [ ...

A unit is a row of a trellis' tile, or two points of a lattice; which bits of it are what weights, its decode knows. Two
neighbouring units share a 32-bit register. Rows are padded to 64, columns to whole blocks; scales stay
f16[*b, rows, 1].
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Format, Leaves
from qjax.formats.vectors.grid import VectorGrid
from qjax.kernels.layouts.planar import ROWS
from qjax.kernels.layouts.scales import pad, up

UNIT = 16
RUN = 16
"""P: four registers of a thread, so that all sixteen weights of its units wait in registers for the matrix unit."""


@partial(jax.tree_util.register_dataclass, data_fields=("words", "scale"), meta_fields=("format", "rows", "columns"))
@dataclasses.dataclass(frozen=True)
class Points:
    """Weights [*b, rows, columns] as in the module's docstring; vmap and scan may stack and slice it.

    Attributes:
      words: u16[*b, N, padded columns K / 16].
      scale: f16[*b, rows, 1].
      format: theirs.
      rows, columns: without padding.
    """

    words: Any  # Array; Any, because shapes and shardings pass through here too
    scale: Any
    format: VectorGrid
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(*b, rows, columns)."""
        return (*self.words.shape[:-2], self.rows, self.columns)

    @property
    def bits(self) -> int:
        """K, of a weight, and words of a unit."""
        return self.format.code.bits

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns with padding."""
        return self.words.shape[-2], self.words.shape[-1] * UNIT // self.bits

    @property
    def block(self) -> int:
        """Columns of P units."""
        return UNIT * RUN

    @property
    def entries(self) -> tuple[int, ...]:
        """() : a step has no scales."""
        return ()

    def buffers(self, columns: int, batch: int) -> list[int]:
        """Bytes of what a step of so many columns reads besides x."""
        return [ROWS * columns * self.bits // 8]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a kernel reads for a weight, padding included."""
        return 8 * (2 * self.words.size + 2 * self.scale.size) / math.prod(self.shape)


def prepack(format: Format, leaves: Leaves) -> Points:
    """A tensor's leaves in the kernels' layout; done once, at load.

    Args:
      format: points of a lattice or of a trellis under a scale of each row.
      leaves: its packed arrays, of weights [*b, rows, columns].

    Raises:
      UserError: another format, or the weights are no matrix.
    """
    if not isinstance(format, VectorGrid):
        raise UserError(f"{format.name} has no layout of points: its codes are no vectors under a scale of each row")
    codes = leaves["codes"]
    if codes.ndim < 2:
        raise UserError(f"a kernel takes a matrix (rows, columns), got {format.name} of shape {format.shape(leaves)}")
    *lead, rows, n = format.shape(leaves)
    bits = format.code.bits
    whole = pad(codes, up(rows, ROWS), up(n, UNIT * RUN) * bits // 8).astype(jnp.uint16)
    pairs = whole.reshape(*whole.shape[:-1], -1, RUN, bits, 2)
    words = (pairs[..., 0] << 8 | pairs[..., 1]).swapaxes(-1, -2)
    return Points(words.reshape(*lead, up(rows, ROWS), -1), leaves["scale"], format, rows, n)


def unpack(packed: Points) -> Leaves:
    """The leaves that `prepack` was given, bit for bit."""
    words = packed.words.reshape(*packed.words.shape[:-1], -1, packed.bits, RUN).swapaxes(-1, -2)
    codes = jnp.stack([words >> 8, words & 255], axis=-1).astype(jnp.uint8)
    codes = codes.reshape(*packed.words.shape[:-1], -1)[..., : packed.rows, : packed.columns * packed.bits // 8]
    return {"codes": codes, "scale": packed.scale}
