"""The layout that the TPU kernels read: levels as integers of the machine's own types, inputs first.

    codes    int2, int4 or int8 [*b, K, N]: T' of each weight, as it is multiplied
    scales   each array of the format's scales, [*b, groups, 1, N]: f32, integers as bf16

                   N ->                                          N ->
        K    [ T' of input 0 for outputs 0 ... N - 1 ]   groups   [ s of outputs 0 ... N - 1 under group 0 ]
        |    [ T' of input 1 ...                     ]     |      [ ...               under group 1 ]

A TPU unpacks its own int4 on the way to the matrix unit, and has no fp16. N is padded to 128 lanes, K to whole groups
and to 128. Codes without a sign, 0 ... 15, are stored as -8 ... 7 and the 8 is left to the sums of the inputs, which a
format with codes without a sign needs anyway. Codes of 3 bits take 4, and of 5 and 6 bits 8, as do IQ4_NL's levels.
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
from qjax.formats.protocol import Format, Leaves, Scales
from qjax.kernels.layouts.coding import Coding, coding
from qjax.kernels.layouts.scales import entries, group_of, matrices, pad, padded_entries, restored, up

LANES = 128


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("format", "rows", "columns", "group"),
)
@dataclasses.dataclass(frozen=True)
class Columns:
    """Weights [*b, rows, columns] as in the module's docstring; vmap and scan may stack and slice it.

    Attributes:
      codes: T', [*b, K, N].
      scales: by the format's own names.
      format: a Grid that has a `Coding` of integers.
      rows, columns: outputs and inputs without padding.
      group: inputs under one scale; K where the row has one.
    """

    codes: Any  # Array; Any, because shapes and shardings pass through here too
    scales: Scales
    format: Grid
    rows: int
    columns: int
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(*b, rows, columns)."""
        return (*self.codes.shape[:-2], self.rows, self.columns)

    @property
    def coding(self) -> Coding:
        """With what T' lacks of the levels as its center."""
        code, half = _signed(self.format)
        return dataclasses.replace(code, center=code.center + half)

    @property
    def padded(self) -> tuple[int, int]:
        """K and N with padding."""
        return self.codes.shape[-2:]

    @property
    def entries(self) -> tuple[int, ...]:
        """How many scales of each kind an output has, padding included."""
        return tuple(x.shape[-3] for x in self.scales.values())

    @property
    def bits(self) -> int:
        """Of a stored code."""
        return jnp.iinfo(self.codes.dtype).bits

    @property
    def bits_per_weight(self) -> float:
        """Bits that a kernel reads for a weight, padding included."""
        bits = self.codes.size * self.bits + sum(8 * x.size * x.dtype.itemsize for x in self.scales.values())
        return bits / (math.prod(self.codes.shape[:-2]) * self.rows * self.columns)


def _signed(format: Format) -> tuple[Coding, int]:
    """A format's coding, and half the range of codes without a sign: stored is T' less that."""
    code = coding(format)
    if code.table:
        whole = all(v == round(v) and abs(v) < 128 for v in code.table)
        if not whole or len(set(code.table)) < len(code.table):
            raise UserError(f"{format.name} has no TPU kernel: its levels are no sixteen integers; XLA decodes it")
        return code, 0
    return code, 2 ** (code.bits - 1) if code.low == 0 and code.bits < 8 else 0


def _type(code: Coding, half: int) -> Any:
    """The smallest that holds every T'."""
    low = code.low - half
    fits = (t for t in (jnp.int2, jnp.int4) if jnp.iinfo(t).min <= low and low + 2**code.bits - 1 <= jnp.iinfo(t).max)
    return jnp.int8 if code.table else next(fits, jnp.int8)


def prepack(format: Format, leaves: Leaves) -> Columns:
    """A tensor's leaves in the kernels' layout; done once, at load.

    Args:
      format: levels times scales, groups a power of two from 16 on, or whole rows.
      leaves: its packed arrays, of weights [*b, rows, columns].

    Raises:
      UserError: the format has no such layout, or the weights are no matrix.
    """
    code, half = _signed(format)
    assert isinstance(format, Grid)  # what has a coding is one
    scales, codes = format.unpack(leaves)
    if codes.ndim < 2:
        raise UserError(f"a kernel takes a matrix (rows, columns), got {format.name} of shape {codes.shape}")
    rows, n = codes.shape[-2:]
    group = group_of(format, scales, codes.shape)
    N, K = up(rows, LANES), up(n, LANES if group == n else max(LANES, group))
    T = (code.values(code.stored(codes)) - half).astype(jnp.int8)
    kept = {}
    for name, x in matrices(scales, codes.shape).items():
        x = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.bfloat16)
        kept[name] = pad(x, N, padded_entries(x.shape[-1], n, K)).swapaxes(-1, -2)[..., None, :]
    T = pad(T, N, K).swapaxes(-1, -2).astype(_type(code, half))
    return Columns(T, kept, format, rows, n, K if group == n else group)


def unpack(packed: Columns) -> Leaves:
    """The leaves that `prepack` was given, bit for bit."""
    code, half = _signed(packed.format)
    rows, n, K = packed.rows, packed.columns, packed.padded[0]
    T = packed.codes.astype(jnp.int8).swapaxes(-1, -2)[..., :rows, :n]
    if code.table:
        of = np.zeros(256, np.uint8)
        of[np.asarray(code.table).astype(np.int8).view(np.uint8)] = np.arange(len(code.table))
        u = jnp.asarray(of)[jax.lax.bitcast_convert_type(T, jnp.uint8).astype(jnp.int32)]
    else:
        u = jax.lax.bitcast_convert_type(T, jnp.uint8) - jnp.uint8(0 if code.bits == 8 else (code.low - half) % 256)
    kept = {
        name: x[..., 0, :].swapaxes(-1, -2)[..., :rows, : entries(x.shape[-3], K, n)]
        for name, x in packed.scales.items()
    }
    return packed.format.pack(restored(packed.format, kept, n), code.codes(u))
