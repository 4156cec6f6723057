"""The layout that the CPU kernels read: outputs side by side, one in each lane of a vector; codes in planes of bytes.

    planes   u8[*b, K bits / 8, N] for each plane of the code (planes.py)
    scales   each array of the format's scales, [*b, groups, N]: f16, bf16 or f32 as the file has it, u8 or i8 integers

                    N ->                                         N ->
        K    [ codes of some inputs for outputs 0 ... ]   groups   [ s of outputs 0 ... N - 1 under group 0 ]
        |    [ codes of the next ...                  ]     |      [ ...               under group 1 ]

A run of U inputs (32, 16 or 8) lies under one scale. Of a plane of b bits it has R = U b / 8 rows, whose row r holds, b
bits each, the codes of inputs r, r + R, r + 2 R ... of the run. Shifts, masks and scales are then those of whole
vectors: along a row of a file's blocks a compiler would have to take vectors apart for them.

Bytes: those of the file, but a whole one for each integer scale or zero (Q4_K: 4.625 bits a weight for 4.5, Q2_K 3.125
for 2.625), and two bits for a trit.
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
from qjax.kernels.layouts.planes import SPLIT
from qjax.kernels.layouts.scales import file_type, group_of, matrices, restored
from qjax.typing import Array, UInt8

RUNS = (32, 16, 8)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "scales"),
    meta_fields=("format", "group", "run"),
)
@dataclasses.dataclass(frozen=True)
class Lanes:
    """Weights [*b, rows, columns] as in the module's docstring; vmap and scan may stack and slice it.

    Attributes:
      planes: of the codes, the lowest bits first.
      scales: by the format's own names.
      format: a Grid that has a `Coding` of integers.
      group: inputs under one scale.
      run: U.
    """

    planes: tuple[Any, ...]  # Any, because shapes and shardings pass through here too
    scales: Scales
    format: Grid
    group: int
    run: int

    @property
    def coding(self) -> Coding:
        return coding(self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        """(*b, rows, columns)."""
        *lead, rows, N = self.planes[0].shape
        return (*lead, N, rows * 8 // SPLIT[self.coding.bits][0][0])

    @property
    def bits_per_weight(self) -> float:
        """Bits that a kernel reads for a weight."""
        leaves = (*self.planes, *self.scales.values())
        return 8 * sum(x.size * x.dtype.itemsize for x in leaves) / math.prod(self.shape)


def prepack(format: Format, leaves: Leaves) -> Lanes:
    """A tensor's leaves in the kernels' layout; done once, at load.

    Args:
      format: integers times scales, groups a power of two from 16 on, or whole rows.
      leaves: its packed arrays, of weights [*b, rows, columns].

    Raises:
      UserError: the format has no such layout, or the weights are no matrix of whole runs.
    """
    code = coding(format)
    assert isinstance(format, Grid)  # what has a coding is one
    if code.table:
        raise UserError(f"{format.name} has no such layout: its levels are a table, no integers")
    scales, codes = format.unpack(leaves)
    if codes.ndim < 2:
        raise UserError(f"a kernel takes a matrix (rows, columns), got {format.name} of shape {codes.shape}")
    group = group_of(format, scales, codes.shape)
    run = next((U for U in RUNS if group % U == 0), 0)
    if not run:
        raise UserError(
            f"{format.name} of shape {codes.shape} has no such layout: its rows are no multiple of 8 weights"
        )
    u = code.stored(codes).swapaxes(-1, -2)
    planes = tuple(_pack((u >> shift) & jnp.uint8(2**bits - 1), bits, run) for bits, shift in SPLIT[code.bits])
    kept = {
        name: x.astype(file_type(format, leaves, name, x)).swapaxes(-1, -2)
        for name, x in matrices(scales, codes.shape).items()
    }
    return Lanes(planes, kept, format, group, run)


def unpack(packed: Lanes) -> Leaves:
    """The leaves that `prepack` was given, bit for bit."""
    kept = {name: x.swapaxes(-1, -2) for name, x in packed.scales.items()}
    codes = packed.coding.codes(stored(packed).swapaxes(-1, -2))
    return packed.format.pack(restored(packed.format, kept, packed.shape[-1]), codes)


def stored(packed: Lanes) -> UInt8[Array, "*b K N"]:
    """u of all weights, inputs first."""
    u = jnp.uint8(0)
    for (bits, shift), plane in zip(SPLIT[packed.coding.bits], packed.planes, strict=True):
        *lead, rows, N = plane.shape
        bytes_ = plane.reshape(*lead, -1, 1, packed.run * bits // 8, N)
        codes = (bytes_ >> _shifts(bits, len(lead) + 1)) & jnp.uint8(2**bits - 1)
        u = u | (codes.reshape(*lead, rows * 8 // bits, N) << shift)
    return u


def _pack(codes: UInt8[Array, "*b K N"], bits: int, run: int) -> UInt8[Array, "*b rows N"]:
    """One plane."""
    *lead, K, N = codes.shape
    parts = codes.reshape(*lead, K // run, 8 // bits, run * bits // 8, N) << _shifts(bits, len(lead) + 1)
    return jnp.sum(parts, axis=-3, dtype=jnp.uint8).reshape(*lead, -1, N)


def _shifts(bits: int, lead: int) -> UInt8[Array, "*1 i 1 1"]:
    """Where in a byte the codes of inputs r, r + R ... begin."""
    return jnp.arange(0, 8, bits, dtype=jnp.uint8).reshape(*(1,) * lead, 8 // bits, 1, 1)
