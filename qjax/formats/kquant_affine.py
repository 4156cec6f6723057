"""Q2_K, Q4_K and Q5_K: super-blocks of 256 weights, sub-blocks with a scale and a minimum of a few bits each.

    w = d sc q - dmin mn        d, dmin fp16;  per sub-block sc, mn of 4 bits (Q2_K) or 6 bits;  q of 2, 4 or 5 bits

    Q2_K, 84 bytes, 16 x 16:   scales[16]  mn << 4 | sc
                               qs[64]      per 128 weights 32 bytes, byte l = q[l] | q[l+32] << 2 | q[l+64] << 4 | ...
                               d, dmin
    Q4_K, 144 bytes, 8 x 32:   d, dmin, scales[12]
                               qs[128]     per 64 weights 32 bytes, byte l = q[l], q[l+32] << 4
    Q5_K, 176 bytes, 8 x 32:   d, dmin, scales[12]
                               qh[32]      bit j of byte l = bit 4 of q[32 j + l]
                               qs[128]     low four bits as Q4_K

    scales[12], j < 4:   byte j      sc[j]  low 6 bits,  sc[j+4] >> 4  top 2
                         byte j + 4  mn[j]  low 6 bits,  mn[j+4] >> 4  top 2
                         byte j + 8  sc[j+4] low nibble, mn[j+4] high nibble

Source: ggml's block_q2_K, block_q4_K, block_q5_K (k-quants, llama.cpp PR 1684). The bytes mean what they mean there;
which bytes a tensor gets is our own search (`affine_search`), which minimizes the plain or importance-weighted squared
error itself.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from qjax.chain import Link
from qjax.formats.affine_search import NEAR, WIDE, WIDEST, Affine, search_affine
from qjax.formats.blocks import (
    block_shape,
    from_fp16_bytes,
    merge,
    pack_planes,
    split,
    to_fp16_bytes,
    unpack_planes,
)
from qjax.formats.exact import apart
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.superblock import by_chunks, integer_scale, once, reciprocal

SEARCH = {
    2: Affine(3, 15, (0.0, 0.125, 0.25), NEAR),
    4: Affine(15, 63, (0.0, 0.033, 0.067, 0.1), WIDE),
    5: Affine(31, 63, (0.0, 0.025, 0.05), WIDEST),
}


@dataclasses.dataclass(frozen=True)
class AffineKQuant(Link):
    """w = d sc q - dmin mn.

    Scales: d, dmin f32[*b, n/256] (fp16 numbers), sc, mn u8[*b, n/256, sub-blocks]; codes u8[*b, n].

    Attributes:
      bits: of a code.
      sub: weights of a sub-block.
    """

    name: str
    ggml_type: int
    bits: int
    sub: int
    block_bytes: int
    block: int = 256
    tile: int = 1
    row_wise: bool = True

    @property
    def about(self) -> str:
        scale_bits = 4 if self.bits == 2 else 6
        return (
            f"GGUF K-quant: {self.bits} bits, {self.block // self.sub} groups with {scale_bits}-bit scales and minima"
        )

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """The scales of least squared error found; see `affine_search`."""
        found = by_chunks(lambda x, v: search_affine(x, v, SEARCH[self.bits]), w, weight, self.block, self.sub)
        return dict(zip(("d", "dmin", "sc", "mn"), found, strict=True))

    def nearest(self, scales: Scales, w: Array) -> Array:
        """Codes of the nearest levels, u8[*b, n]; 0 where the scale is 0."""
        s, m = _products(scales)
        inverse = reciprocal(s)
        inverse, offset = once(inverse[..., None], (m * inverse)[..., None])
        x = w.reshape(*s.shape, self.sub)
        q = jnp.round(jnp.clip(x * inverse + offset, 0, 2**self.bits - 1))
        return once(q.astype(jnp.uint8))[0].reshape(w.shape)

    def decode(self, scales: Scales, codes: Array) -> Array:
        """f32[*b, n], each product rounded as ggml's C rounds it."""
        s, m = _products(scales)
        q = codes.reshape(*s.shape, self.sub).astype(jnp.float32)
        return (apart(s[..., None] * q, jnp.inf) - apart(m, jnp.inf)[..., None]).reshape(codes.shape)

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, Array]:
        s, m = _products(scales)
        return merge(s), merge(-m)

    def level(self, u: Array) -> Array:
        return jnp.round(jnp.clip(u, 0, 2**self.bits - 1))

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        sc = integer_scale(s, scales["d"], scales["sc"], 0, SEARCH[self.bits].steps)
        mn = scales["mn"] if m is None else integer_scale(-m, scales["dmin"], scales["mn"], 0, SEARCH[self.bits].steps)
        return {**scales, "sc": sc, "mn": mn}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        d, dmin = to_fp16_bytes(scales["d"]), to_fp16_bytes(scales["dmin"])
        sc, mn, q = scales["sc"], scales["mn"], codes.reshape(*scales["d"].shape, self.block)
        if self.bits == 2:
            fields = [sc | (mn << 4), merge(pack_planes(split(q, 128), 2)), d, dmin]
        else:
            high = [pack_planes(q >> 4, 1)] if self.bits == 5 else []
            fields = [d, dmin, _pack_six(sc, mn), *high, merge(pack_planes(split(q & 15, 64), 4))]
        return {"blocks": jnp.concatenate(fields, axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        raw = leaves["blocks"]
        if self.bits == 2:
            sc, mn = raw[..., :16] & 15, raw[..., :16] >> 4
            q, d, dmin = merge(unpack_planes(split(raw[..., 16:80], 32), 2)), raw[..., 80:82], raw[..., 82:]
        else:
            d, dmin = raw[..., :2], raw[..., 2:4]
            sc, mn = _unpack_six(raw[..., 4:16])
            q = merge(unpack_planes(split(raw[..., -128:], 32), 4))
            if self.bits == 5:
                q = q | (unpack_planes(raw[..., 16:48], 1) << 4)
        scales = {"d": from_fp16_bytes(d), "dmin": from_fp16_bytes(dmin), "sc": sc, "mn": mn}
        return scales, merge(q)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)


def _products(scales: Scales) -> tuple[Array, Array]:
    """d sc and dmin mn: f32[*b, n/256, sub-blocks]."""
    s = scales["d"][..., None] * scales["sc"].astype(jnp.float32)
    return s, scales["dmin"][..., None] * scales["mn"].astype(jnp.float32)


def _pack_six(sc: Array, mn: Array) -> Array:
    """Eight scales and eight minima of 6 bits: u8[*b, 8] twice -> u8[*b, 12]."""
    parts = [a[..., :4] | ((a[..., 4:] >> 4) << 6) for a in (sc, mn)]
    return jnp.concatenate([*parts, (sc[..., 4:] & 15) | (mn[..., 4:] << 4)], axis=-1)


def _unpack_six(raw: Array) -> tuple[Array, Array]:
    """The inverse of `_pack_six`."""
    a, b, low = raw[..., :4], raw[..., 4:8], raw[..., 8:]
    sc = jnp.concatenate([a & 63, (low & 15) | ((a >> 6) << 4)], axis=-1)
    return sc, jnp.concatenate([b & 63, (low >> 4) | ((b >> 6) << 4)], axis=-1)


FORMATS = (
    AffineKQuant("Q2_K", 10, bits=2, sub=16, block_bytes=84),
    AffineKQuant("Q4_K", 12, bits=4, sub=32, block_bytes=144),
    AffineKQuant("Q5_K", 13, bits=5, sub=32, block_bytes=176),
)
