"""Double quantization: positive scales in 8 bits, the way bitsandbytes stores absmaxes.

    absmax = offset + nested_absmax map[code]

offset is the mean over all absmaxes of a matrix; nested_absmax the largest |absmax - offset| in a block of 256, taken
row by row; the map has 256 values in [-1, 1], denser towards 0 (8-bit Approximations for Parallelism in Deep Learning,
arXiv:1511.04561). Codes are the nearest entries; bitsandbytes looks them up in a table of 2^16 steps, so that a
residual within 2^-15 of a midpoint may get its neighbour there.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from qjax.formats.exact import apart
from qjax.formats.protocol import Scales
from qjax.formats.storage import quotient, reciprocal
from qjax.typing import Array

NESTED = 256
"""Absmaxes that share a nested absmax."""


def dynamic_map() -> np.ndarray:
    """The 256 values, ascending: +-10^(i - 6) times the 2^i midpoints of [0.1, 1] cut in 2^i parts, i = 0..6; 0; 1.

    Float32 throughout, with a fused multiply-add in the cuts and the upper half counted down from 1, as torch does.
    """
    values = [np.array([0.0, 1.0], np.float32)]
    for i in range(7):
        parts = 2**i
        low, high = np.float32(0.1), np.float32(1)
        step = np.float64((high - low) / np.float32(parts))
        k = np.arange(parts + 1)
        up, down = low + step * k, high - step * (parts - k)  # exact in float64, rounded once below
        cuts = np.where(k < (parts + 1) // 2, up, down).astype(np.float32)
        middles = (cuts[:-1] + cuts[1:]) / np.float32(2)
        values += [np.float32(10.0 ** (i - 6)) * middles, np.float32(-(10.0 ** (i - 6))) * middles]
    return np.sort(np.concatenate(values))


_MAP = dynamic_map()
_MIDPOINTS = (_MAP[:-1] + _MAP[1:]) / np.float32(2)


def to_dynamic(absmax: Array) -> Scales:
    """Quantize the absmaxes of a matrix, or of each of a stack.

    Args:
      absmax: f32[*b, out, m]; or [m], one row.

    Returns: absmax u8[*b, out, m], nested_absmax f32[*b, 1, ceil(out m / 256)], offset f32[*b, 1, 1]; for one row
      [m], [ceil(m / 256)] and [1].
    """
    flat = absmax.reshape(*absmax.shape[:-2], -1)
    offset = _mean(flat)
    blocks = _blocks(flat - offset)
    nested = jnp.max(jnp.abs(blocks), axis=-1)
    unit = blocks * reciprocal(nested)[..., None]
    codes = jnp.searchsorted(jnp.asarray(_MIDPOINTS), unit, side="left").astype(jnp.uint8)
    codes = jnp.where(nested[..., None] > 0, codes, jnp.uint8(0))
    codes = codes.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
    keep = (..., None, slice(None)) if absmax.ndim > 1 else ...
    return {"absmax": codes.reshape(absmax.shape), "nested_absmax": nested[keep], "offset": offset[keep]}


def from_dynamic(scales: Scales) -> Array:
    """The absmaxes that `to_dynamic` stored, f32[*b, out, m]: product, then sum, each rounded."""
    codes, nested, offset = scales["absmax"], scales["nested_absmax"], scales["offset"]
    if codes.ndim > 1:
        nested, offset = nested[..., 0, :], offset[..., 0, :]
    flat = codes.reshape(*codes.shape[:-2], -1)
    values = jnp.asarray(_MAP)[_blocks(flat).astype(jnp.int32)]
    products = apart(values * nested[..., None], 3e38)
    products = products.reshape(*flat.shape[:-1], -1)[..., : flat.shape[-1]]
    return (products + offset).reshape(codes.shape)


def _blocks(flat: Array) -> Array:
    """[*b, m] -> [*b, ceil(m / 256), 256], padded with zeros."""
    pad = -flat.shape[-1] % NESTED
    padded = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, pad)])
    return padded.reshape(*flat.shape[:-1], -1, NESTED)


def _mean(x: Array) -> Array:
    """The mean over the last axis, kept, by a tree of pairwise sums: the same bits however it is compiled."""
    count = x.shape[-1]
    total = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2 ** (count - 1).bit_length() - count)])
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2  # slices and sums: XLA would merge reductions, in an order of its own
        total = total[..., :half] + total[..., half:]
    return quotient(total, count)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A store (stores.py) of the absmaxes of a matrix, all of which share its offset."""

    def get(self, scales: Scales) -> Array:
        return from_dynamic(scales)

    def put(self, scales: Scales, v: Array) -> Scales:
        return to_dynamic(v)

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        """None: one absmax moves the offset of all."""
        return ()
