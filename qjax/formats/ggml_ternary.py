"""ggml's ternary types for weights that are ternary already (BitNet, TriLM): w = d t, t in {-1, 0, 1}.

    type    B     bytes   fields, little-endian; d fp16
    TQ1_0   256   54      qs[48] | qh[4] | d      5 trits a byte (the last 4 bytes: 4)
    TQ2_0   256   66      qs[64] | d              2 bits a weight, t + 1

TQ1_0 groups: 32 bytes hold weights 0..159 (byte m: m, m + 32, ... m + 128), 16 bytes hold 160..239 (steps of 16),
4 bytes hold 240..255 (steps of 4). A byte is ceil(N 256 / 243), N the five trits t + 1 as a base-3 number, first
trit highest; multiplying the byte by 3^k and keeping 8 bits moves trit k to the top, where times 3 >> 8 reads it.
TQ2_0: byte m of each half of 32 bytes holds weights m, m + 32, m + 64, m + 96 from its lowest bits up.
Layouts: ggml-common.h of llama.cpp.

Without importance `encode` gives ggml's exact bytes: d = absmax. ggml ignores importance here; `fit` with `weight`
searches d, which matters for weights that are not ternary yet.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.chain import Link
from qjax.formats import exact
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
from qjax.formats.scale_search import search_scale
from qjax.formats.storage import reciprocal, round_fp16

_GROUPS = ((32, 5), (16, 5), (4, 4))  # bytes, trits a byte


@dataclasses.dataclass(frozen=True)
class Ternary(Link):
    """w = d t on blocks of 256.

    Scales: {"d": f32[*b, n/256]}. Codes: t, int8[*b, n] (TQ2_0's unused pattern 3 reads as 2).
    """

    name: str
    ggml_type: int
    block_bytes: int
    block: int = 256
    tile: int = 1
    row_wise: bool = True

    @property
    def about(self) -> str:
        return f"GGUF: ternary, {'five' if self.name == 'TQ1_0' else 'four'} weights in a byte"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """d = absmax; with `weight`, the scale of least weighted error."""
        x = split(w, self.block)
        _, d, _ = self._plain(x)
        if weight is not None:
            d = search_scale(x, split(weight, self.block), d, -1, 1)
        return {"d": d[..., 0]}

    def nearest(self, scales: Scales, w: Array) -> Array:
        """The sign of w / d where it exceeds one half."""
        x, d = split(w, self.block), scales["d"][..., None]
        sign = jnp.sign(x) * jnp.sign(d)
        return merge(jnp.where(jnp.abs(x) > 0.5 * jnp.abs(d), sign, 0.0).astype(jnp.int8))

    def decode(self, scales: Scales, codes: Array) -> Array:
        return merge(split(codes, self.block).astype(jnp.float32) * scales["d"][..., None])

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        """t = round(w / d), halves away from zero, with the unrounded d; with `weight`, fit and nearest."""
        if weight is not None:
            scales = self.fit(w, weight)
            return scales, self.nearest(scales, w)
        x, stored, inverse = self._plain(split(w, self.block))
        codes = lax.round(x * inverse, lax.RoundingMethod.AWAY_FROM_ZERO).astype(jnp.int8)
        return {"d": stored[..., 0]}, merge(codes)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return scales["d"], None

    def level(self, u: Array) -> Array:
        return jnp.sign(u) * (jnp.abs(u) > 0.5).astype(jnp.float32)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {"d": round_fp16(s)}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        trits = split(codes, self.block) + jnp.int8(1)
        fields = _pack_fives(trits) if self.name == "TQ1_0" else _pack_fours(trits)
        return {"blocks": jnp.concatenate([*fields, to_fp16_bytes(scales["d"])], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        fields = blocks[..., :-2]
        trits = _unpack_fives(fields) if self.name == "TQ1_0" else _unpack_fours(fields)
        return {"d": from_fp16_bytes(blocks[..., -2:])}, merge(trits.astype(jnp.int8) - jnp.int8(1))

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)

    def _plain(self, x: Array) -> tuple[Array, Array, Array]:
        """Blocks (lifted), the stored scale and the reciprocal of the unrounded one."""
        tiny = exact.tiny(x)
        x = exact.lift(x, tiny)
        d = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        return x, exact.drop_fp16(d, tiny), reciprocal(d)


def _pack_fives(trits: Array) -> list[Array]:
    fields, at = [], 0
    for size, count in _GROUPS:
        group = trits[..., at : at + size * count].astype(jnp.uint32)
        number = jnp.zeros_like(group[..., :size])
        for k in range(count):
            number = number * 3 + group[..., k * size : (k + 1) * size]
        number = number * 3 ** (5 - count)
        fields.append(((number * 256 + 242) // 243).astype(jnp.uint8))
        at += size * count
    return fields


def _unpack_fives(fields: Array) -> Array:
    trits, at = [], 0
    for size, count in _GROUPS:
        group = fields[..., at : at + size].astype(jnp.uint32)
        trits += [(((group * 3**k) & 255) * 3) >> 8 for k in range(count)]
        at += size
    return jnp.concatenate(trits, axis=-1)


def _pack_fours(trits: Array) -> list[Array]:
    return [pack_planes(trits[..., :128], 2), pack_planes(trits[..., 128:], 2)]


def _unpack_fours(fields: Array) -> Array:
    return jnp.concatenate([unpack_planes(fields[..., :32], 2), unpack_planes(fields[..., 32:], 2)], axis=-1)


FORMATS = (Ternary("TQ1_0", 34, 54), Ternary("TQ2_0", 35, 66))
