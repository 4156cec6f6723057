"""Integers under group scales, as most containers hold them, and qjax's formats that are those.

    W = scale (codes - zero)        codes, zero u8 of `bits` bits        zero 2^(bits - 1): symmetric

Codes, scales and zeros move as they are. Q4_0, Q5_0, Q8_0 and the ternary types of ggml are such grids too, with an
fp16 scale; K-quants, tables and float zeros are not.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.grid import GGML, Grid
from qjax.formats.integer import affine
from qjax.formats.integer_scales import IntegerScales
from qjax.formats.levels import Integers
from qjax.formats.stores import Stored
from qjax.tensor import QTensor

SCALES = {"f16": np.dtype("<f2"), "bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype("<f4")}
KINDS = {dtype: kind for kind, dtype in SCALES.items()}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A format's parameters: weights that share a scale (0: the row), and how the scale is stored."""

    bits: int
    group: int
    symmetric: bool
    scale: str

    def groups(self, n: int) -> int:
        """Of a row of n weights. Raises UserError where they do not fill it."""
        if self.group and n % self.group:
            raise UserError(f"a row of {n} weights is no multiple of its group of {self.group}")
        return n // self.group if self.group else 1

    @property
    def format(self) -> Grid:
        return affine(self.bits, self.group, symmetric=self.symmetric, scale=self.scale)


def kind_of(format: Format) -> Kind:
    """What a format is as integers under group scales. Raises UserError where it is none."""
    if isinstance(format, Grid) and isinstance(format.levels, Integers) and not format.levels.half:
        scaling, store = format.scaling, format.scaling.scale
        whole = isinstance(scaling, IntegerScales) and scaling.zero_kind == "int"
        signed = scaling.zero is None and scaling.offset is None and format.levels.low < 0
        if isinstance(store, Stored) and store.kind in SCALES and (whole or signed):
            bits = max((-2 * format.levels.low - 1).bit_length(), format.levels.bits)
            return Kind(bits, scaling.block, not whole, str(store.kind))
    raise UserError(
        f"{format.name} is no grid of integers under plain group scales; take one that is, as int4_g128 or uint4_g128, "
        "or re-quantize: --type and --requantize"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A weight as integers; see the module's docstring.

    Attributes:
      kind: of its format.
      codes: u8[out, n].
      scale: [out, G], of the type that the kind says.
      zero: u8[out, G].
    """

    kind: Kind
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    @property
    def qtensor(self) -> QTensor:
        """The same as rows (out, in) of the format `kind.format`."""
        scales = {"scale": self.scale.astype(np.float32)}
        codes = self.codes
        if self.kind.symmetric:
            codes = (codes - np.uint8(2 ** (self.kind.bits - 1))).view(np.int8)
        else:
            scales["zero"] = self.zero.astype(np.float32)
        return QTensor(packed(scales, codes, self.kind.format), self.kind.format)


def integers_of(q: QTensor) -> Whole:
    """A packed weight, rows (out, in), as integers. Raises UserError where it is none: by its format, or because it
    lies behind a change of variables."""
    kind = kind_of(q.format)
    if q.applied:
        raise UserError(
            f"the weight lies behind {type(q.applied[0]).__name__}, which the layer would have to run; fold it into "
            "the float model first (`qjax fuse`), or round anew: --type and --requantize"
        )
    assert isinstance(q.format, Grid)
    scales, codes = unpacked(q.leaves, q.format)
    codes, scale = np.asarray(codes), np.asarray(q.format.scaling.scale.get(scales))
    if kind.symmetric:
        codes = codes.view(np.uint8) + np.uint8(2 ** (kind.bits - 1))
    zero = None if kind.symmetric else np.asarray(scales["zero"]).astype(np.uint8)
    return whole(kind, codes, scale.astype(SCALES[kind.scale]), zero)


def whole(kind: Kind, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None = None) -> Whole:
    """Integers that were read; no zeros where they are symmetric. Raises UserError where scales are no numbers."""
    if not np.isfinite(scale.astype(np.float32)).all():
        raise UserError("its scales have NaN or infinite values; the file is broken")
    return Whole(kind, codes, scale, np.full(scale.shape, 2 ** (kind.bits - 1), np.uint8) if zero is None else zero)


def in_ggml(w: Whole, format: GGML) -> QTensor:
    """The same values in a type of ggml's, to the bit.

    Raises:
      UserError: the type has no such codes, its blocks do not divide the groups, or a scale is no fp16.
    """
    levels, block = format.levels, format.block
    assert isinstance(levels, Integers)
    span = w.codes.shape[-1] // w.scale.shape[-1]
    codes = w.codes.astype(np.int16).reshape(*w.scale.shape, span) - w.zero[..., None].astype(np.int16)
    low = -128 if levels.high == 127 else levels.low  # bytes, which Q8_0's own quantizer uses down to -127 only
    if codes.min() < low or codes.max() > levels.high:
        raise UserError(
            f"its codes reach from {codes.min()} to {codes.max()}, and {format.name} has {low} to {levels.high}"
        )
    if span % block:
        raise UserError(f"{span} weights share a scale, and a block of {format.name} has {block}")
    scale = w.scale.astype(np.float32)
    if (scale.astype(np.float16).astype(np.float32) != scale).any():
        raise UserError(f"its {w.kind.scale} scales are no fp16 numbers, and {format.name} has nothing else")
    scales = {"d": np.repeat(scale, span // block, axis=-1)}
    return QTensor(packed(scales, codes.reshape(w.codes.shape).astype(np.int8), format), format)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes u8[*b, n] as a little-endian bit stream of 32-bit words, the last one padded: i32[*b, ceil(n bits / 32)].

    >>> words(np.arange(8, dtype=np.uint8), 4).tolist()
    [1985229328]
    """
    return packed_bytes_of(codes, bits, 4).view("<i4")


def codes_of(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The inverse of `words`: i32[*b, m] -> u8[*b, n]."""
    return unpacked_bytes(np.ascontiguousarray(packed).view(np.uint8), bits, n)


def packed_bytes_of(codes: np.ndarray, bits: int, unit: int = 1) -> np.ndarray:
    """The same stream as bytes, padded to a whole number of `unit` bytes: u8[*b, m]."""
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 32)])
    size = -(-codes.shape[-1] * bits // (8 * unit)) * unit
    return np.ascontiguousarray(np.asarray(_stream(padded, bits))[..., :size])


def unpacked_bytes(stream: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The inverse of `packed_bytes_of`: u8[*b, m] -> u8[*b, n]."""
    short = -stream.shape[-1] % bits  # a stream of bytes that ends within a code
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, short)])
    return np.asarray(_unstream(stream, bits))[..., :n]


@partial(jax.jit, static_argnames="bits")
def _stream(codes: jax.Array, bits: int) -> jax.Array:
    return pack_bits(codes, bits)


@partial(jax.jit, static_argnames="bits")
def _unstream(stream: jax.Array, bits: int) -> jax.Array:
    return unpack_bits(stream, bits)


@partial(jax.jit, static_argnames="format")
def packed(scales: dict[str, jax.Array], codes: jax.Array, format: Grid) -> dict[str, jax.Array]:
    return format.pack({k: jnp.asarray(v) for k, v in scales.items()}, codes)


@partial(jax.jit, static_argnames="format")
def unpacked(leaves: dict[str, jax.Array], format: Grid) -> tuple[dict[str, jax.Array], jax.Array]:
    return format.unpack(leaves)
