"""ggml's types of one level of scales: Q4_0, Q5_0, Q8_0 (w = d q) and Q4_1, Q5_1 (w = d q + m).

    type   B    bytes   fields, little-endian; d, m fp16
    Q4_0   32   18      d | qs[16]                 (q - 8) d
    Q4_1   32   20      d | m | qs[16]             q d + m
    Q5_0   32   22      d | qh[4] | qs[16]         (q - 16) d
    Q5_1   32   24      d | m | qh[4] | qs[16]     q d + m
    Q8_0   32   34      d | int8[32]               q d

Byte j of qs holds the low four bits of weight j (low nibble) and weight j + 16 (high nibble); bit j of qh is the
fifth bit of weight j. Layouts: ggml-common.h of llama.cpp.

Without importance `encode` gives ggml's exact bytes (quantize_row_*_ref), whose codes come from the scale before it
is rounded to fp16. With importance it searches the scale for the least sum weight (w - w_hat)^2, which ggml does not do
for Q8_0.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import exact
from qjax.formats.fields import Blocks, Half, Planes, Stream, merge, split
from qjax.formats.grid import GGML, Scaling
from qjax.formats.levels import Integers
from qjax.formats.protocol import Scales
from qjax.formats.scale_search import search_scale, search_scale_min
from qjax.formats.storage import quotient, reciprocal
from qjax.formats.stores import Stored


@dataclasses.dataclass(frozen=True)
class OneScale(Scaling):
    """d, fp16: {"d": f32[*b, n / block]}.

    Attributes:
      covers: "peak": the first weight of largest magnitude becomes the lowest level; "absmax": the highest.
    """

    block: int
    covers: Literal["peak", "absmax"]
    scale = Stored("d")

    def fit(self, levels: Integers, w: Array, weight: Array | None) -> Scales:
        """d = peak / low or absmax / high; with `weight`, the scale of least weighted error."""
        x = split(w, self.block)
        d = self._plain(levels, x)[1]
        if weight is not None:
            d = search_scale(x, split(weight, self.block), d, levels.low, levels.high)
        return {"d": d[..., 0]}

    def encode(self, levels: Integers, w: Array, weight: Array | None) -> tuple[Scales, Array]:
        """Codes by the unrounded d: trunc(w / d - low + 1/2) + low, or w / d with halves away from zero."""
        if weight is not None:
            return super().encode(levels, w, weight)
        x, d, inverse = self._plain(levels, split(w, self.block))
        if self.covers == "absmax":
            codes = lax.round(x * inverse, lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int8)
        else:
            half = -levels.low
            codes = exact.apart(x * inverse, 4.0 * half) + (half + 0.5)
            codes = (jnp.minimum(codes.astype(jnp.int8), 2 * half - 1) - half).astype(jnp.int8)
        return {"d": d[..., 0]}, merge(codes)

    def _plain(self, levels: Integers, x: Array) -> tuple[Array, Array, Array]:
        """Blocks (lifted), the stored scale and the reciprocal of the unrounded one."""
        tiny = exact.tiny(x)
        x = exact.lift(x, tiny)
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        if self.covers == "absmax":
            d = quotient(largest, levels.high)
        else:
            negative = _first_is_negative(x, jnp.abs(x) == largest) & (largest > 0)
            d = jnp.where(negative, largest, -largest) * (-1 / levels.low)
        d = exact.denormal_grid(d, tiny)
        return x, exact.drop_fp16(d, tiny), reciprocal(d)


@dataclasses.dataclass(frozen=True)
class ScaleAndMinimum(Scaling):
    """d and m, fp16, the block's range cut evenly: {"d": f32[*b, n / block], "m": likewise}."""

    block: int = 32
    scale = Stored("d")
    offset = Stored("m", near=())

    def fit(self, levels: Integers, w: Array, weight: Array | None) -> Scales:
        """d = (max - min) / high, m = min; with `weight`, the pair of least weighted error."""
        x = split(w, self.block)
        _, d, m, _ = self._plain(levels, x)
        if weight is not None:
            d, m = search_scale_min(x, split(weight, self.block), (d, m), levels.high)
        return {"d": d[..., 0], "m": m[..., 0]}

    def encode(self, levels: Integers, w: Array, weight: Array | None) -> tuple[Scales, Array]:
        """q = trunc((w - min) / d + 1/2) with the unrounded d and min; with `weight`, fit and nearest."""
        if weight is not None:
            return super().encode(levels, w, weight)
        x, d, m, inverse = self._plain(levels, split(w, self.block))
        codes = exact.apart(x * inverse, 2.0 * levels.high) + 0.5
        return {"d": d[..., 0], "m": m[..., 0]}, merge(jnp.minimum(codes.astype(jnp.uint8), levels.high))

    def _plain(self, levels: Integers, x: Array) -> tuple[Array, Array, Array, Array]:
        """Blocks above their minimum (lifted), the stored scale and minimum, the reciprocal of the unrounded scale."""
        tiny = exact.tiny(x)
        x = exact.lift(x, tiny)
        low = jnp.min(x, axis=-1, keepdims=True)
        spread = jnp.abs(jnp.max(x, axis=-1, keepdims=True) - low)
        d = exact.denormal_grid(quotient(spread, levels.high), tiny)
        # a minimum of zero has the sign of the first zero
        zero = jnp.where(_first_is_negative(x, x == 0), -0.0, 0.0)
        m = exact.drop_fp16(jnp.where(low == 0, zero, low), tiny)
        return x - low, exact.drop_fp16(d, tiny), m, reciprocal(d)


def _first_is_negative(x: Array, chosen: Array) -> Array:
    """Whether the first chosen element of each block has its sign bit set: bool[*b, 1]."""
    place = 2 * lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) + jnp.signbit(x).astype(jnp.int32)
    none = 2 * x.shape[-1]
    return (jnp.min(jnp.where(chosen, place, none), axis=-1, keepdims=True) & 1) == 1


_FOUR = (Planes("q", 32, 4),)
_FIVE = (Stream("q", 32, 1, shift=4), Planes("q", 32, 4))
_D, _M = Half("d"), Half("m")


def _signed(name: str, number: int, bits: int, *fields: Stream | Planes) -> GGML:
    half = 2 ** (bits - 1)
    layout = Blocks(number, 32, (_D, *fields), (("q", half),))
    about = f"GGUF: {2**bits} signed levels, one fp16 scale"
    return GGML(name, Integers(-half, half - 1), OneScale(32, "peak"), layout, about)


def _ranged(name: str, number: int, bits: int, *fields: Stream | Planes) -> GGML:
    about = f"GGUF: {2**bits} levels between the block's minimum and maximum"
    return GGML(name, Integers(0, 2**bits - 1), ScaleAndMinimum(), Blocks(number, 32, (_D, _M, *fields)), about)


FORMATS = (
    _signed("Q4_0", 2, 4, *_FOUR),
    _ranged("Q4_1", 3, 4, *_FOUR),
    _signed("Q5_0", 6, 5, *_FIVE),
    _ranged("Q5_1", 7, 5, *_FIVE),
    GGML(
        "Q8_0", Integers(-127, 127), OneScale(32, "absmax"), Blocks(8, 32, (_D, Stream("q", 32, 8)), (("q", 0),)),
        "GGUF: signed bytes, one fp16 scale",
    ),
)  # fmt: skip
