"""The layout of Q2_K and Q4_K for GPUs: integer scales beside the codes that they multiply.

    unit     sixteen weights of a row under one scale, `bits` words of 16 bits, the first code the lowest
    words    u16[*b, N, K bits / 16]       a super-block: first word of its 16 units, second word of them ...
    scales   u16[*b, N, K / 32]            a word for 32 weights: 4-bit sc and mn of both units, or 8 bits each of one
                                           group; those of pair i and i + 4 of units side by side
    d, dmin  f16[*b, K / 256, N]

A pair of units shares a 32-bit register, and pair i and i + 4 of a super-block lie in one thread, with their scales.
Rows are padded to 64, columns to 512. Bytes: those of a Q2_K file, 0.125 bits a weight more than those of Q4_K.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats.grid import Grid
from qjax.formats.protocol import Format, Leaves
from qjax.kernels.layouts.planar import ROWS
from qjax.kernels.layouts.scales import matrices, pad, restored, up
from qjax.typing import Array, UInt8

NAMES = ("Q2_K", "Q4_K")
UNIT, SUPER = 16, 256
_ORDER = np.array([0, 4, 1, 5, 2, 6, 3, 7])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("words", "scales", "d", "dmin"),
    meta_fields=("format", "rows", "columns"),
)
@dataclasses.dataclass(frozen=True)
class Supers:
    """Weights [*b, rows, columns] as in the module's docstring; vmap and scan may stack and slice it.

    Attributes:
      words, scales, d, dmin: see there.
      format: Q2_K or Q4_K.
      rows, columns: without padding.
    """

    words: Any  # Array; Any, because shapes and shardings pass through here too
    scales: Any
    d: Any
    dmin: Any
    format: Grid
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(*b, rows, columns)."""
        return (*self.words.shape[:-2], self.rows, self.columns)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns with padding."""
        return self.words.shape[-2], self.scales.shape[-1] * 2 * UNIT

    @property
    def bits(self) -> int:
        """Of a code, and words of a unit."""
        return self.words.shape[-1] * UNIT // self.padded[1]

    @property
    def block(self) -> int:
        """Two super-blocks, whose scales are read together."""
        return 2 * SUPER

    @property
    def entries(self) -> tuple[int, ...]:
        """d and dmin of a row."""
        return (self.d.shape[-2],) * 2

    def buffers(self, columns: int, batch: int) -> list[int]:
        """Bytes of what a step of so many columns reads besides x: words, scales, d, dmin, parts of x's sums."""
        supers = columns // SUPER
        return [
            ROWS * columns * self.bits // 8,
            ROWS * columns // 16,
            *[2 * ROWS * supers] * 2,
            6 * UNIT * batch * supers,
        ]

    @property
    def bits_per_weight(self) -> float:
        """Bits that a kernel reads for a weight, padding included."""
        return 16 * sum(x.size for x in (self.words, self.scales, self.d, self.dmin)) / math.prod(self.shape)


def prepack(format: Format, leaves: Leaves) -> Supers:
    """A tensor's leaves in the kernel's layout; done once, at load.

    Args:
      format: Q2_K or Q4_K.
      leaves: its packed arrays, of weights [*b, rows, columns].

    Raises:
      UserError: another format, or the weights are no matrix.
    """
    if format.name not in NAMES:
        raise UserError(f"{format.name} has no layout of super-blocks with integer scales: {', '.join(NAMES)} have")
    assert isinstance(format, Grid)
    found, codes = format.unpack(leaves)
    if codes.ndim < 2:
        raise UserError(f"a kernel takes a matrix (rows, columns), got {format.name} of shape {codes.shape}")
    *lead, rows, n = codes.shape
    N, K = up(rows, ROWS), up(n, 2 * SUPER)
    bits, kept = (2 if format.name == NAMES[0] else 4), matrices(found, codes.shape)
    fields = pad(codes, N, K).astype(jnp.uint16).reshape(*lead, N, -1, UNIT, bits, UNIT // bits)
    places = jnp.arange(0, UNIT, bits, dtype=jnp.uint16).reshape((1,) * (fields.ndim - 1) + (-1,))
    words = jnp.sum(fields << places, axis=-1, dtype=jnp.uint16).swapaxes(-1, -2).reshape(*lead, N, -1)
    sc, mn = (pad(kept[key], N, kept[key].shape[-1] * K // n).astype(jnp.uint16) for key in ("sc", "mn"))
    d, dmin = (pad(kept[key].astype(jnp.float16), N, K // SUPER).swapaxes(-1, -2) for key in ("d", "dmin"))
    if bits == 2:
        both = (sc | mn << 4).reshape(*lead, N, -1, 8, 2)
        pairs = both[..., 0] | both[..., 1] << 8
    else:
        pairs = (sc | mn << 8).reshape(*lead, N, -1, 8)
    return Supers(words, pairs[..., _ORDER].reshape(*lead, N, -1), d, dmin, format, rows, n)


def unpack(packed: Supers) -> Leaves:
    """The leaves that `prepack` was given, bit for bit."""
    bits, rows, n = packed.bits, packed.rows, packed.columns
    *lead, N, _ = packed.words.shape
    words = packed.words.reshape(*lead, N, -1, bits, UNIT).swapaxes(-1, -2)[..., None]
    places = jnp.arange(0, UNIT, bits, dtype=jnp.uint16).reshape((1,) * (words.ndim - 1) + (-1,))
    codes = (words >> places & jnp.uint16(2**bits - 1)).astype(jnp.uint8).reshape(*lead, N, -1)[..., :rows, :n]
    pairs = packed.scales.reshape(*lead, N, -1, 8)[..., np.argsort(_ORDER)]
    low, high = (pairs & 255).astype(jnp.uint8), (pairs >> 8).astype(jnp.uint8)
    sc, mn = (low, high) if bits == 4 else _halves(jnp.stack([low, high], axis=-1))
    group = 2 * UNIT if bits == 4 else UNIT
    kept = {
        "sc": sc.reshape(*lead, N, -1)[..., :rows, : n // group],
        "mn": mn.reshape(*lead, N, -1)[..., :rows, : n // group],
        "d": packed.d.swapaxes(-1, -2)[..., :rows, : n // SUPER],
        "dmin": packed.dmin.swapaxes(-1, -2)[..., :rows, : n // SUPER],
    }
    return packed.format.pack(restored(packed.format, kept, n), codes)


def _halves(byte: UInt8[Array, "*b"]) -> tuple[UInt8[Array, "*b"], UInt8[Array, "*b"]]:
    return byte & jnp.uint8(15), byte >> 4
