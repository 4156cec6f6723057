"""ggml's types without a scale search (to be completed)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.protocol import Leaves, Scales


@dataclasses.dataclass(frozen=True)
class Q8_0:
    """Signed bytes: w = d * q, d = absmax / 127 in fp16, 32 weights a block."""

    name: str = "Q8_0"
    ggml_type: int = 8
    block: int = 32
    tile: int = 1
    block_bytes: int = 34

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        blocks = w.reshape(*w.shape[:-1], -1, self.block)
        d = jnp.max(jnp.abs(blocks), axis=-1) / 127
        return {"d": d.astype(jnp.float16).astype(jnp.float32)}

    def nearest(self, scales: Scales, w: Array) -> Array:
        d = scales["d"][..., None]
        blocks = w.reshape(*w.shape[:-1], -1, self.block)
        q = jnp.where(d > 0, blocks / jnp.where(d > 0, d, 1), 0)
        q = lax.round(q, lax.RoundingMethod.AWAY_FROM_ZERO)
        return jnp.clip(q, -127, 127).astype(jnp.int8).reshape(w.shape)

    def decode(self, scales: Scales, codes: Array) -> Array:
        blocks = codes.reshape(*codes.shape[:-1], -1, self.block).astype(jnp.float32)
        return (blocks * scales["d"][..., None]).reshape(codes.shape)

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        d = lax.bitcast_convert_type(scales["d"].astype(jnp.float16), jnp.uint8)
        q = lax.bitcast_convert_type(
            codes.reshape(*codes.shape[:-1], -1, self.block).astype(jnp.int8), jnp.uint8
        )
        return {"blocks": jnp.concatenate([d, q], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        d = lax.bitcast_convert_type(blocks[..., :2], jnp.float16).astype(jnp.float32)
        q = lax.bitcast_convert_type(blocks[..., 2:], jnp.int8)
        return {"d": d}, q.reshape(*q.shape[:-2], -1)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, n, _ = leaves["blocks"].shape
        return (*lead, n * self.block)


FORMATS = (Q8_0(),)
