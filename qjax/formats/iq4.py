"""IQ4_NL and IQ4_XS: four-bit codes into a fixed table of 16 uneven levels.

    w = d T[q]  (IQ4_NL, 32 weights a block)        w = d sc T[q]  (IQ4_XS, 256 in sub-blocks of 32, sc in [-32, 31])

    T = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113

    IQ4_NL, 18 bytes:   d, qs[16]       byte l = q[l], q[l+16] << 4
    IQ4_XS, 136 bytes:  d, scales_h u16 (top 2 bits of sc + 32 per sub-block), scales_l[4] (its low 4 bits)
                        qs[128]         per 32 weights 16 bytes, as IQ4_NL

Source: ggml's block_iq4_nl, block_iq4_xs. The search is our own: scales of both signs (the table is lopsided), judged
by the squared error itself (ggml weighs by x^2 where no importance is given); see `symmetric_search` for IQ4_XS.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.chain import Link
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
from qjax.formats.superblock import by_chunks, integer_scale, once, reciprocal, squares, store
from qjax.formats.symmetric_search import Symmetric, error, real_scales, search_symmetric

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MIDDLES = tuple((a + b) / 2 for a, b in itertools.pairwise(LEVELS))


def index(u: Array) -> Array:
    """The index of the level nearest to u, the upper one at ties: u8 of u's shape."""
    q = jnp.zeros(u.shape, jnp.uint8)
    for middle in _MIDDLES:  # 15 vector comparisons; a binary search or a gather would not vectorize
        q = q + (u >= middle).astype(jnp.uint8)
    return q


def value(u: Array) -> Array:
    """The level nearest to u, f32 of u's shape."""
    t = jnp.full(u.shape, LEVELS[0], jnp.float32)
    for middle, step in zip(_MIDDLES, np.diff(LEVELS).tolist(), strict=True):
        t = t + jnp.where(u >= middle, jnp.float32(step), jnp.float32(0))
    return t


_FAR = tuple(np.linspace(-114, -142, 8).tolist())
_NEAR = tuple(np.linspace(101, 127, 8).tolist())
SEARCH = Symmetric(value, 32, (*_FAR[::2], *_NEAR[::2]), down=3, up=3)
_POLISH = 3


@dataclasses.dataclass(frozen=True)
class IQ4NL(Link):
    """w = d T[q]. Scales: d f32[*b, n/32] (fp16 numbers); codes u8[*b, n]."""

    name: str = "IQ4_NL"
    ggml_type: int = 20
    block: int = 32
    tile: int = 1
    row_wise: bool = True
    block_bytes: int = 18

    @property
    def about(self) -> str:
        return "GGUF: 16 levels spaced for bell-shaped weights, one fp16 scale"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """The scale of least squared error found: trials of both signs, then least squares, each judged in fp16."""
        (d,) = by_chunks(_search, w, weight, self.block, self.block)
        return {"d": d[..., 0]}

    def nearest(self, scales: Scales, w: Array) -> Array:
        """Indices of the nearest levels, u8[*b, n]."""
        (inverse,) = once(reciprocal(scales["d"])[..., None])
        return once(index(split(w, self.block) * inverse))[0].reshape(w.shape)

    def decode(self, scales: Scales, codes: Array) -> Array:
        """f32[*b, n]."""
        return merge(scales["d"][..., None] * _lookup(split(codes, self.block)))

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return scales["d"], None

    def level(self, u: Array) -> Array:
        return value(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {"d": store(s)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        return {
            "blocks": jnp.concatenate([to_fp16_bytes(scales["d"]), pack_planes(split(codes, self.block), 4)], axis=-1)
        }

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        raw = leaves["blocks"]
        return {"d": from_fp16_bytes(raw[..., :2])}, merge(unpack_planes(raw[..., 2:], 4))

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)


@dataclasses.dataclass(frozen=True)
class IQ4XS(Link):
    """w = d sc T[q]. Scales: d f32[*b, n/256] (fp16 numbers), sc i8[*b, n/256, 8]; codes u8[*b, n]."""

    name: str = "IQ4_XS"
    ggml_type: int = 23
    block: int = 256
    tile: int = 1
    row_wise: bool = True
    block_bytes: int = 136

    @property
    def about(self) -> str:
        return "GGUF: IQ4_NL's levels, 8 groups with 6-bit scales"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """The scales of least squared error found; see `symmetric_search`."""
        d, sc = by_chunks(lambda x, v: search_symmetric(x, v, SEARCH), w, weight, self.block, 32)
        return {"d": d, "sc": sc}

    def nearest(self, scales: Scales, w: Array) -> Array:
        """Indices of the nearest levels, u8[*b, n]."""
        (inverse,) = once(reciprocal(_product(scales))[..., None])
        return once(index(w.reshape(*inverse.shape[:-1], 32) * inverse))[0].reshape(w.shape)

    def decode(self, scales: Scales, codes: Array) -> Array:
        """f32[*b, n]."""
        s = _product(scales)[..., None]
        return (s * _lookup(codes.reshape(*s.shape[:-1], 32))).reshape(codes.shape)

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return merge(_product(scales)), None

    def level(self, u: Array) -> Array:
        return value(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {**scales, "sc": integer_scale(s, scales["d"], scales["sc"], -32, 31)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        u = (scales["sc"] + jnp.int8(32)).astype(jnp.uint8)
        q = codes.reshape(*scales["d"].shape, 8, 32)
        fields = [to_fp16_bytes(scales["d"]), pack_bits(u >> 4, 2), pack_bits(u & 15, 4), merge(pack_planes(q, 4))]
        return {"blocks": jnp.concatenate(fields, axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        raw = leaves["blocks"]
        u = unpack_bits(raw[..., 4:8], 4) | (unpack_bits(raw[..., 2:4], 2).astype(jnp.uint8) << 4)
        sc = u.astype(jnp.int8) - jnp.int8(32)
        codes = merge(merge(unpack_planes(split(raw[..., 8:], 16), 4)))
        return {"d": from_fp16_bytes(raw[..., :2]), "sc": sc}, codes

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)


def _search(x: Array, v: Array | None) -> tuple[Array]:
    """IQ4_NL: x f32[32, 1, N] -> d f32[1, N]."""
    d = store(real_scales(x, v, value, (*_FAR, *_NEAR)))
    best = error(x, v, d, value), d
    for _ in range(_POLISH):
        (t,) = once(value(x * reciprocal(best[1])[None]))
        vt = t if v is None else v * t
        d = store(jnp.sum(vt * x, axis=0) * reciprocal(jnp.sum(vt * t, axis=0)))
        e = error(x, v, d, value)
        best = jnp.where(e < best[0], e, best[0]), jnp.where(e < best[0], d, best[1])
    # No level is zero: where the least fp16 scale is still too coarse, zeros are nearer.
    return (jnp.where((squares(x, v) < best[0]) & jnp.isfinite(best[1]), 0.0, best[1]),)


def _product(scales: Scales) -> Array:
    """d sc: f32[*b, n/256, 8]."""
    return scales["d"][..., None] * scales["sc"].astype(jnp.float32)


def _lookup(codes: Array) -> Array:
    return jnp.asarray(LEVELS, jnp.float32)[codes.astype(jnp.int32)]


FORMATS = (IQ4NL(), IQ4XS())
