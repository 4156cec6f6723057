"""ggml's types of one level of scales: Q4_0, Q5_0, Q8_0 (w = d q) and Q4_1, Q5_1 (w = d q + m).

    type   B   bytes   fields, little-endian; d, m fp16
    Q4_0   32  18      d | qs[16]                 (q - 8) d
    Q4_1   32  20      d | m | qs[16]             q d + m
    Q5_0   32  22      d | qh[4] | qs[16]         (q - 16) d
    Q5_1   32  24      d | m | qh[4] | qs[16]     q d + m
    Q8_0   32  34      d | int8[32]               q d

Byte j of qs holds the low four bits of weight j (low nibble) and weight j + 16 (high nibble); bit j of qh is the
fifth bit of weight j. Layouts: ggml-common.h of llama.cpp.

Without importance `encode` gives ggml's exact bytes (quantize_row_*_ref), whose codes come from the scale before it
is rounded to fp16. With importance it searches the scale for the least sum weight (w - w_hat)^2.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.chain import Link
from qjax.formats import exact
from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.blocks import (
    block_shape,
    from_fp16_bytes,
    merge,
    pack_planes,
    split,
    to_fp16_bytes,
    unpack_planes,
)
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.scale_search import search_scale, search_scale_min
from qjax.formats.storage import quotient, reciprocal, round_fp16

_EVEN, _AWAY = lax.RoundingMethod.TO_NEAREST_EVEN, lax.RoundingMethod.AWAY_FROM_ZERO


@dataclasses.dataclass(frozen=True)
class ScaledBlock(Link):
    """w = d l with signed levels l in [-2^(bits-1), 2^(bits-1)): the weight of largest magnitude becomes the lowest.

    Scales: {"d": f32[*b, n/32]}. Codes: l, int8[*b, n].
    """

    name: str
    ggml_type: int
    bits: int
    block_bytes: int
    block: int = 32
    tile: int = 1
    row_wise: bool = True

    @property
    def about(self) -> str:
        return f"GGUF: {2**self.bits} signed levels, one fp16 scale"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def half(self) -> int:
        """Minus the lowest level."""
        return 2 ** (self.bits - 1)

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """d = (first weight of largest magnitude) / -half; with `weight`, the scale of least weighted error."""
        x = split(w, self.block)
        _, d, _ = self._plain(x)
        if weight is not None:
            d = search_scale(x, split(weight, self.block), d, -self.half, self.half - 1)
        return {"d": d[..., 0]}

    def nearest(self, scales: Scales, w: Array) -> Array:
        x = split(w, self.block)
        return merge(_nearest(x, scales["d"][..., None], -self.half, self.half - 1))

    def decode(self, scales: Scales, codes: Array) -> Array:
        return merge(split(codes, self.block).astype(jnp.float32) * scales["d"][..., None])

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        """l = trunc(w / d + half + 1/2) - half with the unrounded d; with `weight`, fit and nearest."""
        if weight is not None:
            scales = self.fit(w, weight)
            return scales, self.nearest(scales, w)
        x, stored, inverse = self._plain(split(w, self.block))
        codes = exact.apart(x * inverse, 4.0 * self.half) + (self.half + 0.5)
        codes = jnp.minimum(codes.astype(jnp.int8), 2 * self.half - 1) - self.half
        return {"d": stored[..., 0]}, merge(codes.astype(jnp.int8))

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return scales["d"], None

    def level(self, u: Array) -> Array:
        return jnp.clip(lax.round(u, _EVEN), -self.half, self.half - 1)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {"d": round_fp16(s)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        q = split(codes, self.block).astype(jnp.uint8) + jnp.uint8(self.half)
        return {"blocks": jnp.concatenate([to_fp16_bytes(scales["d"]), *_fields(q, self.bits)], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        q = _codes(blocks[..., 2:], self.bits).astype(jnp.int8) - jnp.int8(self.half)
        return {"d": from_fp16_bytes(blocks[..., :2])}, merge(q)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)

    def _plain(self, x: Array) -> tuple[Array, Array, Array]:
        """Blocks (lifted), the stored scale and the reciprocal of the unrounded one."""
        tiny = exact.tiny(x)
        x = exact.lift(x, tiny)
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        negative = _first_is_negative(x, jnp.abs(x) == largest) & (largest > 0)
        d = jnp.where(negative, largest, -largest) * (1 / self.half)
        d = exact.denormal_grid(d, tiny)
        return x, exact.drop_fp16(d, tiny), reciprocal(d)


@dataclasses.dataclass(frozen=True)
class ScaledMinBlock(Link):
    """w = d q + m with q in [0, 2^bits): the block's range, cut evenly.

    Scales: {"d": f32[*b, n/32], "m": f32[*b, n/32]}. Codes: q, uint8[*b, n].
    """

    name: str
    ggml_type: int
    bits: int
    block_bytes: int
    block: int = 32
    tile: int = 1
    row_wise: bool = True

    @property
    def about(self) -> str:
        return f"GGUF: {2**self.bits} levels between the block's minimum and maximum"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def high(self) -> int:
        """The highest code."""
        return 2**self.bits - 1

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """d = (max - min) / high, m = min; with `weight`, the pair of least weighted error."""
        x = split(w, self.block)
        _, d, m, _ = self._plain(x)
        if weight is not None:
            d, m = search_scale_min(x, split(weight, self.block), (d, m), self.high)
        return {"d": d[..., 0], "m": m[..., 0]}

    def nearest(self, scales: Scales, w: Array) -> Array:
        x = split(w, self.block) - scales["m"][..., None]
        return merge(_nearest(x, scales["d"][..., None], 0, self.high).astype(jnp.uint8))

    def decode(self, scales: Scales, codes: Array) -> Array:
        product = split(codes, self.block).astype(jnp.float32) * scales["d"][..., None]  # exact: 5 + 11 bits
        return merge(product + scales["m"][..., None])

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        """q = trunc((w - min) / d + 1/2) with the unrounded d and min; with `weight`, fit and nearest."""
        if weight is not None:
            scales = self.fit(w, weight)
            return scales, self.nearest(scales, w)
        x, d, m, inverse = self._plain(split(w, self.block))
        codes = exact.apart(x * inverse, 2.0 * self.high) + 0.5
        codes = jnp.minimum(codes.astype(jnp.uint8), self.high)
        return {"d": d[..., 0], "m": m[..., 0]}, merge(codes)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, Array]:
        return scales["d"], scales["m"]

    def level(self, u: Array) -> Array:
        return jnp.clip(lax.round(u, _EVEN), 0, self.high)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {"d": round_fp16(s), "m": scales["m"] if m is None else round_fp16(m)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        q = split(codes, self.block).astype(jnp.uint8)
        fields = [to_fp16_bytes(scales["d"]), to_fp16_bytes(scales["m"]), *_fields(q, self.bits)]
        return {"blocks": jnp.concatenate(fields, axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        scales = {"d": from_fp16_bytes(blocks[..., :2]), "m": from_fp16_bytes(blocks[..., 2:4])}
        return scales, merge(_codes(blocks[..., 4:], self.bits))

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)

    def _plain(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Blocks above their minimum (lifted), the stored scale and minimum, the reciprocal of the unrounded scale."""
        tiny = exact.tiny(x)
        x = exact.lift(x, tiny)
        low = jnp.min(x, axis=-1, keepdims=True)
        spread = jnp.abs(jnp.max(x, axis=-1, keepdims=True) - low)
        d = exact.denormal_grid(exact.divided(spread, self.high), tiny)
        # a minimum of zero has the sign of the first zero
        zero = jnp.where(_first_is_negative(x, x == 0), -0.0, 0.0)
        m = exact.drop_fp16(jnp.where(low == 0, zero, low), tiny)
        return x - low, exact.drop_fp16(d, tiny), m, reciprocal(d)


@dataclasses.dataclass(frozen=True)
class Q8_0(Link):
    """w = d q with q in [-127, 127] and d = absmax / 127.

    Scales: {"d": f32[*b, n/32]}. Codes: q, int8[*b, n].
    """

    name: str = "Q8_0"
    ggml_type: int = 8
    block: int = 32
    tile: int = 1
    row_wise: bool = True
    block_bytes: int = 34

    @property
    def about(self) -> str:
        return "GGUF: signed bytes, one fp16 scale"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """d = absmax / 127; with `weight`, the scale of least weighted error (ggml ignores importance here)."""
        x = split(w, self.block)
        _, d, _ = self._plain(x)
        if weight is not None:
            d = search_scale(x, split(weight, self.block), d, -127, 127)
        return {"d": d[..., 0]}

    def nearest(self, scales: Scales, w: Array) -> Array:
        return merge(_nearest(split(w, self.block), scales["d"][..., None], -127, 127))

    def decode(self, scales: Scales, codes: Array) -> Array:
        return merge(split(codes, self.block).astype(jnp.float32) * scales["d"][..., None])

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        """q = round(w / d), halves away from zero, with the unrounded d; with `weight`, fit and nearest."""
        if weight is not None:
            scales = self.fit(w, weight)
            return scales, self.nearest(scales, w)
        x, stored, inverse = self._plain(split(w, self.block))
        codes = lax.round(x * inverse, _AWAY).astype(jnp.int8)
        return {"d": stored[..., 0]}, merge(codes)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return scales["d"], None

    def level(self, u: Array) -> Array:
        return jnp.clip(lax.round(u, _EVEN), -127, 127)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {"d": round_fp16(s)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        q = lax.bitcast_convert_type(split(codes, self.block).astype(jnp.int8), jnp.uint8)
        return {"blocks": jnp.concatenate([to_fp16_bytes(scales["d"]), q], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        q = lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
        return {"d": from_fp16_bytes(blocks[..., :2])}, merge(q)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)

    def _plain(self, x: Array) -> tuple[Array, Array, Array]:
        """Blocks (lifted), the stored scale and the reciprocal of the unrounded one."""
        tiny = exact.tiny(x)
        x = exact.lift(x, tiny)
        d = exact.divided(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 127)
        d = exact.denormal_grid(d, tiny)
        return x, exact.drop_fp16(d, tiny), reciprocal(d)


def _first_is_negative(x: Array, chosen: Array) -> Array:
    """Whether the first chosen element of each block has its sign bit set: bool[*b, 1]."""
    place = 2 * lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) + jnp.signbit(x).astype(jnp.int32)
    none = 2 * x.shape[-1]
    return (jnp.min(jnp.where(chosen, place, none), axis=-1, keepdims=True) & 1) == 1


def _nearest(x: Array, d: Array, low: int, high: int) -> Array:
    """round(x / d) within [low, high], int8; 0 where d is 0."""
    q = jnp.where(d == 0, 0.0, quotient(x, jnp.where(d == 0, 1.0, d)))
    return jnp.clip(lax.round(q, _EVEN), low, high).astype(jnp.int8)


def _fields(q: Array, bits: int) -> list[Array]:
    """Codes u8[*b, 32] of 4 or 5 bits as the fields [qh], qs."""
    low = pack_planes(q & 15, 4)
    return [low] if bits == 4 else [pack_bits(q >> 4, 1), low]


def _codes(fields: Array, bits: int) -> Array:
    """The inverse of `_fields`, from its concatenation."""
    if bits == 4:
        return unpack_planes(fields, 4)
    return unpack_planes(fields[..., 4:], 4) | (unpack_bits(fields[..., :4], 1) << 4)


FORMATS = (
    ScaledBlock("Q4_0", 2, bits=4, block_bytes=18),
    ScaledMinBlock("Q4_1", 3, bits=4, block_bytes=20),
    ScaledBlock("Q5_0", 6, bits=5, block_bytes=22),
    ScaledMinBlock("Q5_1", 7, bits=5, block_bytes=24),
    Q8_0(),
)
