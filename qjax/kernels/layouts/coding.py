"""What a kernel has to know of a format: how many bits a code takes, what codes stand for, how scales are stored.

    w_hat = s (T' + c - z)      or      w_hat = s (T' + c) + m        T' = level(u)

u is the code as a kernel reads it, `bits` bits without a sign; T' is exact in bfloat16 for integers (|T'| <= 128), and
a constant c, where levels lie between integers or reach 255, is left to what multiplies the sums of the inputs:

    sum_k x_k w_k  =  sum_groups s (sum_k x_k T'_k)  +  (s (c - z)  or  s c + m) sum_k x_k

    bits < 8      u = q - low,  T' = u + low,  or table[u]
    8             u = the byte of q - c in two's complement,  T' = q - c

A format without this form (lattices, dense floats, scales under scales of another kind) has no kernel: XLA decodes it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.grid import Grid, Scaling
from qjax.formats.levels import Integers, SignMagnitude, Table
from qjax.formats.protocol import Format
from qjax.formats.stores import Multiple, Stored
from qjax.typing import Array, Integer, UInt8

BITS = (2, 3, 4, 5, 6, 8)


@dataclasses.dataclass(frozen=True)
class Coding:
    """See the module's docstring.

    Attributes:
      bits: of a code.
      low: the lowest level's code q.
      center: c.
      table: sixteen levels by code; () for integers.
      scaling: how s, and m or z, are stored.
    """

    bits: int
    low: int
    center: float
    table: tuple[float, ...]
    scaling: Scaling

    @property
    def ranged(self) -> bool:
        """Whether the sums of the inputs are needed: there is a c, m or z."""
        return bool(self.center) or self.scaling.offset is not None or self.scaling.zero is not None

    def stored(self, codes: Integer[Array, "*b n"]) -> UInt8[Array, "*b n"]:
        """q -> u."""
        low = int(self.center) if self.bits == 8 else self.low
        return (codes.astype(jnp.uint8) - jnp.uint8(low % 256)) & jnp.uint8(2**self.bits - 1)

    def codes(self, stored: UInt8[Array, "*b n"]) -> Integer[Array, "*b n"]:
        """u -> q; the inverse of `stored`, in the type in which the format keeps codes."""
        low = int(self.center) if self.bits == 8 else self.low
        q = stored + jnp.uint8(low % 256)
        return lax.bitcast_convert_type(q, jnp.int8) if self.low < 0 else q

    def values(self, stored: UInt8[Array, "*b n"]) -> Array:
        """T' of u, f32[*b, n]."""
        if self.table:
            return jnp.asarray(self.table, jnp.float32)[stored.astype(jnp.int32)]
        if self.bits == 8:
            return lax.bitcast_convert_type(stored, jnp.int8).astype(jnp.float32)
        return stored.astype(jnp.float32) + self.low


def coding(format: Format) -> Coding:
    """The coding of a format.

    Raises:
      UserError: it has none; the message says why.

    >>> from qjax.formats import format
    >>> coding(format("Q4_0")).low, coding(format("uint8_g128")).center, coding(format("int3_g64_mid_mse")).center
    (-8, 128.0, 0.5)
    """
    why = unfit(format)
    if why:
        raise UserError(f"{format.name} has no kernel: {why}; XLA decodes it")
    assert isinstance(format, Grid)
    levels = format.levels
    if isinstance(levels, Integers):
        center = 0.5 * levels.half + (128.0 if levels.low == 0 and levels.bits == 8 else 0.0)
        return Coding(levels.bits, levels.low, center, (), format.scaling)
    return Coding(4, 0, 0.0, _table(levels), format.scaling)


def unfit(format: Format) -> str:
    """Why a format has no coding; "" where it has one.

    >>> from qjax.formats import format
    >>> unfit(format("Q4_K")), unfit(format("F16"))
    ('', 'its levels are neither integers nor a table of sixteen')
    """
    if not isinstance(format, Grid):
        return "it is not levels times scales"
    levels, scaling = format.levels, format.scaling
    if isinstance(levels, Integers):
        if levels.bits not in BITS or (levels.half and levels.bits == 8):
            return f"its codes have {levels.bits} bits" + (" and half-integer levels" if levels.half else "")
    elif not isinstance(levels, Table | SignMagnitude) or len(_table(levels)) != 16:
        return "its levels are neither integers nor a table of sixteen"
    stores = [store for store in (scaling.scale, scaling.offset, scaling.zero) if store is not None]
    if not all(isinstance(store, Stored | Multiple) for store in stores):
        return "its scales are stored in a way that no kernel reads"
    return ""


def _table(levels: object) -> tuple[float, ...]:
    if isinstance(levels, SignMagnitude):
        return (*levels.magnitudes, *(0.0 - x for x in levels.magnitudes))
    return tuple(float(v) for v in levels.values) if isinstance(levels, Table) else ()
