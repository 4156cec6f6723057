"""Q3_K and Q6_K: super-blocks of 256 weights, 16 sub-blocks of 16, each with an integer scale of either sign.

    w = d sc q        d fp16;  Q3_K: sc of 6 bits in [-32, 31], q in [-4, 3];  Q6_K: sc int8, q in [-32, 31]

    Q3_K, 110 bytes:  hmask[32]   bit j of byte l = bit 2 of q[32 j + l] + 4
                      qs[64]      per 128 weights 32 bytes, byte l = low two bits of q + 4 of l, l+32, l+64, l+96
                      scales[12]  u = sc + 32: byte j < 8 = low nibbles of u[j], u[j+8];
                                  byte 8 + i = top two bits of u[i], u[i+4], u[i+8], u[i+12]
                      d
    Q6_K, 210 bytes:  ql[128]     per 128 weights 64 bytes, byte l = low nibbles of q + 32 of l, l+64
                      qh[64]      per 128 weights 32 bytes, byte l = top two bits of q + 32 of l, l+32, l+64, l+96
                      scales[16]  int8
                      d

Source: ggml's block_q3_K, block_q6_K (k-quants, llama.cpp PR 1684). The bytes mean what they mean there; which bytes a
tensor gets is our own search (`symmetric_search`): ggml without importance weighs errors by x^2, we by 1.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.chain import Link
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
from qjax.formats.superblock import by_chunks, integer_scale, once, reciprocal
from qjax.formats.symmetric_search import Symmetric, search_symmetric


def _three(u: Array) -> Array:
    return jnp.round(jnp.clip(u, -4, 3))


def _six(u: Array) -> Array:
    return jnp.round(jnp.clip(u, -32, 31))


_TRIALS = (-3.2, -3.7, -4.2, -4.8, 3.0, 3.5, 4.0, 4.6)
SEARCH = {
    3: Symmetric(_three, 32, _TRIALS, down=8, up=8),
    6: Symmetric(_six, 128, (-32.0,), down=3, up=18, headroom=1.06),
}


@dataclasses.dataclass(frozen=True)
class SymmetricKQuant(Link):
    """w = d sc q.

    Scales: d f32[*b, n/256] (fp16 numbers), sc i8[*b, n/256, 16]; codes i8[*b, n].

    Attributes:
      bits: of a code.
    """

    name: str
    ggml_type: int
    bits: int
    block_bytes: int
    block: int = 256
    sub: int = 16
    tile: int = 1
    row_wise: bool = True

    @property
    def about(self) -> str:
        scale_bits = 6 if self.bits == 3 else 8
        return f"GGUF K-quant: {self.bits} bits signed, {self.block // self.sub} groups with {scale_bits}-bit scales"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """The scales of least squared error found; see `symmetric_search`."""
        found = by_chunks(lambda x, v: search_symmetric(x, v, SEARCH[self.bits]), w, weight, self.block, self.sub)
        return dict(zip(("d", "sc"), found, strict=True))

    def nearest(self, scales: Scales, w: Array) -> Array:
        """Codes of the nearest levels, i8[*b, n]; 0 where the scale is 0."""
        (inverse,) = once(reciprocal(_product(scales))[..., None])
        q = SEARCH[self.bits].round(w.reshape(*inverse.shape[:-1], self.sub) * inverse)
        return once(q.astype(jnp.int8))[0].reshape(w.shape)

    def decode(self, scales: Scales, codes: Array) -> Array:
        """f32[*b, n]."""
        s = _product(scales)[..., None]
        return (s * codes.reshape(*s.shape[:-1], self.sub).astype(jnp.float32)).reshape(codes.shape)

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return merge(_product(scales)), None

    def level(self, u: Array) -> Array:
        return SEARCH[self.bits].round(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        steps = SEARCH[self.bits].steps
        return {**scales, "sc": integer_scale(s, scales["d"], scales["sc"], -steps, steps - 1)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        d, sc = to_fp16_bytes(scales["d"]), scales["sc"]
        q = codes.reshape(*scales["d"].shape, self.block) + jnp.int8(2 ** (self.bits - 1))
        q = q.astype(jnp.uint8)
        halves = split(q, 128)
        if self.bits == 3:
            u = (sc + jnp.int8(32)).astype(jnp.uint8)
            six = [pack_planes(u & 15, 4), pack_planes(u >> 4, 2)]
            fields = [pack_planes(q >> 2, 1), merge(pack_planes(halves & 3, 2)), *six]
        else:
            low, high = merge(pack_planes(halves & 15, 4)), merge(pack_planes(halves >> 4, 2))
            fields = [low, high, lax.bitcast_convert_type(sc, jnp.uint8)]
        return {"blocks": jnp.concatenate([*fields, d], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        raw = leaves["blocks"]
        if self.bits == 3:
            u = unpack_planes(raw[..., 96:104], 4) | (unpack_planes(raw[..., 104:108], 2) << 4)
            sc = u.astype(jnp.int8) - jnp.int8(32)
            q = merge(unpack_planes(split(raw[..., 32:96], 32), 2)) | (unpack_planes(raw[..., :32], 1) << 2)
        else:
            sc = lax.bitcast_convert_type(raw[..., 192:208], jnp.int8)
            low, high = (
                merge(unpack_planes(split(raw[..., :128], 64), 4)),
                merge(unpack_planes(split(raw[..., 128:192], 32), 2)),
            )
            q = low | (high << 4)
        codes = q.astype(jnp.int8) - jnp.int8(2 ** (self.bits - 1))
        return {"d": from_fp16_bytes(raw[..., -2:]), "sc": sc}, merge(codes)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)


def _product(scales: Scales) -> Array:
    """d sc: f32[*b, n/256, 16]."""
    return scales["d"][..., None] * scales["sc"].astype(jnp.float32)


FORMATS = (
    SymmetricKQuant("Q3_K", 11, bits=3, block_bytes=110),
    SymmetricKQuant("Q6_K", 14, bits=6, block_bytes=210),
)
