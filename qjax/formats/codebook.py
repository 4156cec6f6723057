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

from qjax.errors import UserError
from qjax.formats.codebook_search import search_absmax
from qjax.formats.dynamic_map import NESTED, Dynamic
from qjax.formats.grid import Grid, Scaling
from qjax.formats.integer_search import weighted_error
from qjax.formats.levels import Table
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import quotient
from qjax.formats.stores import Stored
from qjax.typing import Array, Float, Integer

# The published constants: bitsandbytes' own normal quantiles (offset 0.9677083) rounded to float32.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)).tolist()

LEVELS = {"NF4": Table(_NF4), "FP4": Table((*_FP4, *(0 - x for x in _FP4)))}


@dataclasses.dataclass(frozen=True)
class Absmax(Scaling):
    """s = absmax of a block: {"absmax": f32[*b, n / block]}, or of `Dynamic` where it is quantized too.

    Attributes:
      block: a power of two, 32 to 4096.
      double: quantize the absmax.
    """

    block: int
    double: bool

    @property
    def scale(self) -> Stored | Dynamic:
        return Dynamic() if self.double else Stored("absmax", "f32")

    @property
    def signed(self) -> bool:
        return False

    @property
    def rows(self) -> int:
        return 0 if self.double else 1

    def fit(self, levels: Table, w: Array, weight: Array | None) -> Scales:
        return self.scale.put({}, self._found(levels, w, weight))

    def encode(self, levels: Table, w: Array, weight: Array | None) -> tuple[Scales, Array]:
        absmax = self._found(levels, w, weight)
        scales = self.scale.put({}, absmax)
        by = {"absmax": absmax} if weight is None else scales
        return scales, (Absmax(self.block, False) if weight is None else self).nearest(levels, by, w)

    def units(self, scales: Scales, x: Float[Array, "*b G g"]) -> Float[Array, "*b G g"]:
        """x (1 / absmax), finite; absmax may be slightly negative once it is rounded."""
        absmax = self.scale.get(scales)
        return x * quotient(jnp.float32(1), jnp.where(jnp.abs(absmax) > 1e-38, absmax, 1e-38))[..., None]

    def _found(self, levels: Table, w: Array, weight: Array | None) -> Array:
        """The absmaxes, or with a weight the searched scales where they are better."""
        x = self._blocks(w)
        absmax = jnp.max(jnp.abs(x), axis=-1)
        if weight is None:
            return absmax
        h = self._blocks(weight)
        searched = search_absmax(w, weight, self.block, levels)
        # compared as stored: block by block, or, where storing ties the blocks of a matrix together, by matrix
        size = math.prod(x.shape[-min(3, x.ndim) :]) if self.double else self.block
        lead = x.shape[:-3] if self.double else x.shape[:-1]

        def error(absmax: Array) -> Array:
            stored = self.scale.put({}, absmax)
            s = self.scale.get(stored)[..., None]
            x_hat = levels.round(self.units(stored, x))[0] * s
            return weighted_error(*(t.reshape(*lead, size) for t in (x, h, x_hat)))

        better = error(searched) < error(absmax)
        return jnp.where(better.reshape(better.shape + (1,) * (absmax.ndim - better.ndim)), searched, absmax)

    def _blocks(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.block, self.block)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two codes a byte, the first in the high nibble; scales as they are."""

    block: int
    scale_bits: float

    @property
    def bits(self) -> float:
        return 4 + self.scale_bits / self.block

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        pairs = codes.reshape(*codes.shape[:-1], -1, self.block)
        return {"codes": (pairs[..., 0::2] << 4) | pairs[..., 1::2], **scales}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        packed = leaves["codes"]
        codes = jnp.stack([packed >> 4, packed & 15], axis=-1)
        return {k: v for k, v in leaves.items() if k != "codes"}, codes.reshape(*packed.shape[:-2], -1)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, count, _ = leaves["codes"].shape
        return (*lead, count * self.block)


def codebook(levels: str, block: int = 64, double: bool = False) -> Grid:
    """NF4 or FP4; see the module's docstring.

    Args:
      levels: "NF4" or "FP4".
      block: weights under one absmax: a power of two, 32 to 4096.
      double: quantize the absmax too.

    Raises:
      UserError: other levels, another block.
    """
    if levels not in LEVELS:
        raise UserError(f"a codebook's levels are {' or '.join(LEVELS)}, got {levels!r}")
    if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise UserError(f"{levels} blocks are powers of two from 32 to 4096, as in bitsandbytes; got {block}")
    name = levels + (f"_b{block}" if block != 64 else "") + ("_dq" if double else "")
    kinds = "16 quantiles of a normal (QLoRA)" if levels == "NF4" else "16 four-bit floats"
    about = f"bitsandbytes: {kinds}, {'8-bit' if double else 'f32'} absmax per {block}"
    return Grid(name, LEVELS[levels], Absmax(block, double), Pairs(block, 8 + 32 / NESTED if double else 32.0), about)


def parse(name: str) -> Grid | None:
    """NF4 or FP4 with any block: "NF4_b128", "FP4_b256_dq"; None for other names.

    >>> parse("NF4_b128_dq").bits_per_weight
    4.0634765625
    """
    found = re.fullmatch(r"(NF4|FP4)(?:_b([1-9]\d*))?(_dq)?", name)
    return found and codebook(found[1], int(found[2] or 64), bool(found[3]))


FORMATS = tuple(codebook(levels, 64, double) for levels in ("NF4", "FP4") for double in (False, True))
