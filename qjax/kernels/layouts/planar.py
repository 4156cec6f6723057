"""The layout that the GPU kernels read: rows of words in planes, scales with rows last.

    planes   u16[*b, N, K bits / 16] for each plane of the code (planes.py), N and K padded
    scales   each array of the format's scales, [*b, groups, N]: f16, bf16 or f32 as the file has it, u8 or i8 integers

                    K ->                                        N ->
        N    [ words of row 0   ]                    groups   [ s of rows 0 ... N - 1 under group 0 ]
        |    [ words of row 1   ]                      |      [ ...                 under group 1 ]

Rows are padded to 64, those of one warpgroup; K to whole blocks of words and of scales. What is added has scale 0. A
run of P neighbouring weights (16, 32 or 64) lies under one scale, so that scales go onto sums of products.

Bytes: those of the file, and one byte for each 6-bit integer scale (Q4_K: 4.625 bits a weight for 4.5, Q3_K 3.56 for
3.44); padding besides.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.grid import Grid
from qjax.formats.protocol import Format, Leaves, Scales
from qjax.kernels.layouts.coding import Coding, coding
from qjax.kernels.layouts.planes import SPLIT, WORD, pack_plane, unpack_plane
from qjax.kernels.layouts.scales import entries, file_type, group_of, matrices, pad, padded_entries, restored, up

ROWS = 64
_BLOCK = 512  # codes in a block of words, at most
_RUNS = (64, 32, 16)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "scales"),
    meta_fields=("format", "rows", "columns", "group", "run"),
)
@dataclasses.dataclass(frozen=True)
class Planar:
    """Weights [*b, rows, columns] as in the module's docstring; vmap and scan may stack and slice it.

    Attributes:
      planes: of the codes, the lowest bits first.
      scales: by the format's own names.
      format: a Grid that has a `Coding`.
      rows, columns: without padding.
      group: columns under one scale; K where the row has one.
      run: P.
    """

    planes: tuple[Any, ...]  # Any, because shapes and shardings pass through here too
    scales: Scales
    format: Grid
    rows: int
    columns: int
    group: int
    run: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(*b, rows, columns)."""
        return (*self.planes[0].shape[:-2], self.rows, self.columns)

    @property
    def coding(self) -> Coding:
        return coding(self.format)

    @property
    def padded(self) -> tuple[int, int]:
        """N and K with padding."""
        bits = SPLIT[self.coding.bits][0][0]
        return self.planes[0].shape[-2], self.planes[0].shape[-1] * WORD // bits

    @property
    def block(self) -> int:
        """Codes in a block of words, of the plane of fewest bits."""
        return block_of(self.coding.bits, self.run)

    @property
    def entries(self) -> tuple[int, ...]:
        """How many scales of each kind a row has, padding included."""
        return tuple(x.shape[-2] for x in self.scales.values())

    def buffers(self, columns: int, batch: int) -> list[int]:
        """Bytes of what a step of so many columns reads besides x: words, scales, and sums of x, if any."""
        K = self.padded[1]
        found = [ROWS * columns * x.shape[-1] * 2 // K for x in self.planes]
        found += [ROWS * entries(x.shape[-2], K, columns) * x.dtype.itemsize for x in self.scales.values()]
        return found + ([4 * batch * max(columns // self.group, 1)] if self.coding.ranged else [])

    @property
    def bits_per_weight(self) -> float:
        """Bits that a kernel reads for a weight, padding included."""
        leaves = (*self.planes, *self.scales.values())
        lead = math.prod(self.planes[0].shape[:-2])
        return 8 * sum(x.size * x.dtype.itemsize for x in leaves) / (lead * self.rows * self.columns)


def prepack(format: Format, leaves: Leaves) -> Planar:
    """A tensor's leaves in the kernels' layout; done once, at load.

    Args:
      format: levels times scales, groups a power of two from 16 on, or whole rows.
      leaves: its packed arrays, of weights [*b, rows, columns].

    Raises:
      UserError: the format has no such layout, or the weights are no matrix.
    """
    code = coding(format)
    assert isinstance(format, Grid)  # what has a coding is one
    scales, codes = format.unpack(leaves)
    if codes.ndim < 2:
        raise UserError(f"a kernel takes a matrix (rows, columns), got {format.name} of shape {codes.shape}")
    rows, n = codes.shape[-2:]
    group = group_of(format, scales, codes.shape)
    run = _run(code.bits, group, n)
    block = block_of(code.bits, run)
    N, K = up(rows, ROWS), up(n, block if group == n else max(block, group))
    u = pad(code.stored(codes), N, K)
    planes = tuple(pack_plane((u >> shift) & (2**bits - 1), bits, run) for bits, shift in SPLIT[code.bits])
    kept = {}
    for name, x in matrices(scales, codes.shape).items():
        x = x.astype(file_type(format, leaves, name, x))
        kept[name] = pad(x, N, padded_entries(x.shape[-1], n, K)).swapaxes(-1, -2)
    return Planar(planes, kept, format, rows, n, K if group == n else group, run)


def unpack(packed: Planar) -> Leaves:
    """The leaves that `prepack` was given, bit for bit."""
    rows, n, K = packed.rows, packed.columns, packed.padded[1]
    u = jnp.uint8(0)
    for (bits, shift), words in zip(SPLIT[packed.coding.bits], packed.planes, strict=True):
        u = u | (unpack_plane(words, bits, packed.run) << shift)
    kept = {name: x.swapaxes(-1, -2)[..., :rows, : entries(x.shape[-2], K, n)] for name, x in packed.scales.items()}
    return packed.format.pack(restored(packed.format, kept, n), packed.coding.codes(u[..., :rows, :n]))


def block_of(bits: int, run: int) -> int:
    """Codes that the words of all planes of `bits` bits hold together, for runs of P."""
    return max(WORD // plane * run for plane, _ in SPLIT[bits])


def _run(bits: int, group: int, n: int) -> int:
    """The longest run that a group holds and whose block is not too long."""
    return next(P for P in _RUNS if (group == n or group % P == 0) and block_of(bits, P) <= _BLOCK)
