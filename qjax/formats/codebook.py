"""bitsandbytes' 4-bit levels: w_hat = absmax level[code], blocks of 64; double quantization of the absmax.

    NF4     16 quantiles of the normal distribution, 0 and both ends among them (QLoRA, arXiv:2305.14314, appendix E)
    FP4     sign, 2 bits of exponent, 1 of mantissa, over 12:  0  1/192  2/3  1  1/3  1/2  1/6  1/4, then negative
    _b128   other blocks: 32 to 4096, powers of two
    _dq     absmax = offset + nested_absmax dynamic[code]: offset the mean over a matrix, blocks of 256 absmaxes

Codes are the nearest level of x (1 / absmax), a tie at the float32 midpoint to the lower one. In the `_dq` forms codes
are chosen with the absmax before it is rounded, as bitsandbytes does (`nearest`, given stored scales, uses those).
With a weight, each block's scale is searched around its absmax for the least weighted error.

Leaves, for weights [*b, n]; a matrix is the last two axes (out, n) and its absmaxes are taken row by row, so stacked
matrices may be mapped or scanned over, and rows of one matrix may not be:

    codes          u8[*b, n / block, block / 2]    the first weight in the high nibble
    absmax         f32[*b, n / block], or, _dq, u8[*b, n / block]
    nested_absmax  f32[*b[:-1], 1, ceil(out n / block / 256)]
    offset         f32[*b[:-1], 1, 1]

`bits_per_weight` leaves out the offset and the padding of the last block of 256.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np

from qjax.chain import Link
from qjax.errors import UserError
from qjax.formats.codebook_search import nearest_level, search_absmax
from qjax.formats.dynamic_map import NESTED, from_dynamic, to_dynamic
from qjax.formats.integer_search import weighted_error
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import quotient
from qjax.typing import Array, Float, Integer

# The published constants: bitsandbytes' own normal quantiles (offset 0.9677083) rounded to float32.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)

LEVELS = {"NF4": np.array(_NF4, np.float32), "FP4": np.concatenate([_FP4, 0 - _FP4])}


@dataclasses.dataclass(frozen=True)
class Codebook(Link):
    """NF4 or FP4; see the module's docstring.

    Attributes:
      levels: "NF4" or "FP4".
      block: weights under one absmax: a power of two, 32 to 4096.
      double: quantize the absmax too.
    """

    levels: str
    block: int = 64
    double: bool = False

    def __post_init__(self) -> None:
        if self.levels not in LEVELS:
            raise UserError(f"a codebook's levels are {' or '.join(LEVELS)}, got {self.levels!r}")
        if self.block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise UserError(
                f"{self.levels} blocks are powers of two from 32 to 4096, as in bitsandbytes; got {self.block}"
            )

    @property
    def name(self) -> str:
        return self.levels + (f"_b{self.block}" if self.block != 64 else "") + ("_dq" if self.double else "")

    @property
    def tile(self) -> int:
        return 1

    @property
    def row_wise(self) -> bool:
        return not self.double

    @property
    def about(self) -> str:
        levels = "16 quantiles of a normal (QLoRA)" if self.levels == "NF4" else "16 four-bit floats"
        return f"bitsandbytes: {levels}, {'8-bit' if self.double else 'f32'} absmax per {self.block}"

    @property
    def bits_per_weight(self) -> float:
        return 4 + ((8 + 32 / NESTED) if self.double else 32) / self.block

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        return self._stored(self._absmax_or_search(w, weight))

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        x = self._blocks(w)
        return self._codes(x, self._absmax(scales)).reshape(w.shape)

    def decode(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        levels = jnp.asarray(LEVELS[self.levels])[self._blocks(codes).astype(jnp.int32)]
        return (levels * self._absmax(scales)[..., None]).reshape(codes.shape)

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b n"]]:
        absmax = self._absmax_or_search(w, weight)
        scales = self._stored(absmax)
        chosen_by = absmax if weight is None else self._absmax(scales)
        return scales, self._codes(self._blocks(w), chosen_by).reshape(w.shape)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return self._absmax(scales), None

    def level(self, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        return self._level(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return self._stored(jnp.maximum(s, 0.0))

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        pairs = self._blocks(codes).astype(jnp.uint8)
        return {"codes": (pairs[..., 0::2] << 4) | pairs[..., 1::2], **scales}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        packed = leaves["codes"]
        codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
        scales = {k: v for k, v in leaves.items() if k != "codes"}
        return scales, codes.reshape(*packed.shape[:-2], packed.shape[-2] * self.block)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, count, _ = leaves["codes"].shape
        return (*lead, count * self.block)

    def _blocks(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.block, self.block)

    def _codes(self, x: Array, absmax: Array) -> Array:
        table = LEVELS[self.levels]
        order = _ascending(table)
        at = _position(table[order], x * _reciprocal(absmax)[..., None])
        return jnp.asarray(order.astype(np.uint8))[at]

    def _level(self, u: Array) -> Array:
        return nearest_level(u, np.unique(LEVELS[self.levels]))

    def _absmax_or_search(self, w: Array, weight: Array | None) -> Array:
        x = self._blocks(w)
        absmax = jnp.max(jnp.abs(x), axis=-1)
        if weight is None:
            return absmax
        h = self._blocks(weight)
        searched = search_absmax(w, weight, self.block, np.unique(LEVELS[self.levels]))
        # compared as stored: block by block, or, where storing ties the blocks of a matrix together, by matrix
        axes = math.prod(x.shape[-min(3, x.ndim) :]) if self.double else self.block
        lead = x.shape[:-3] if self.double else x.shape[:-1]

        def error(absmax: Array) -> Array:
            stored = self._absmax(self._stored(absmax))
            x_hat = self._level(x * _reciprocal(stored)[..., None]) * stored[..., None]
            return weighted_error(*(t.reshape(*lead, axes) for t in (x, h, x_hat)))

        better = error(searched) < error(absmax)
        return jnp.where(better.reshape(better.shape + (1,) * (absmax.ndim - better.ndim)), searched, absmax)

    def _stored(self, absmax: Array) -> Scales:
        return to_dynamic(absmax) if self.double else {"absmax": absmax}

    def _absmax(self, scales: Scales) -> Array:
        return from_dynamic(scales) if self.double else scales["absmax"]


def _ascending(table: np.ndarray) -> np.ndarray:
    """The codes of the distinct levels, by value; of FP4's two zeros the first."""
    return np.unique(table, return_index=True)[1]


def _position(ascending: np.ndarray, u: Array) -> Array:
    """Index of the nearest level; a tie at the float32 midpoint goes to the lower."""
    midpoints = (ascending[:-1] + ascending[1:]) / np.float32(2)
    return jnp.searchsorted(jnp.asarray(midpoints), u, side="left", method="compare_all")


def _reciprocal(absmax: Array) -> Array:
    """1 / absmax, finite; absmax may be slightly negative once it is rounded."""
    return quotient(jnp.float32(1), jnp.where(jnp.abs(absmax) > 1e-38, absmax, 1e-38))


def parse(name: str) -> Codebook | None:
    """NF4 or FP4 with any block: "NF4_b128", "FP4_b256_dq"; None for other names.

    >>> parse("NF4_b128_dq").bits_per_weight
    4.0634765625
    """
    found = re.fullmatch(r"(NF4|FP4)(?:_b([1-9]\d*))?(_dq)?", name)
    return found and Codebook(found[1], int(found[2] or 64), bool(found[3]))


FORMATS = tuple(Codebook(levels, 64, double) for levels in ("NF4", "FP4") for double in (False, True))
