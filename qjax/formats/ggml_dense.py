"""The float types of GGUF files as formats with blocks of one weight, so that every GGUF tensor is a QTensor.

    type   B   bytes   field, little-endian
    F32    1   4       float32, bit for bit
    F16    1   2       IEEE half, to nearest even; beyond 65504 it overflows to infinity
    BF16   1   2       the upper half of a float32, to nearest even

No scales. Codes are the stored bit patterns: uint32 for F32, uint16 for the others.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.chain import Link
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import fp16_bits


@dataclasses.dataclass(frozen=True)
class Dense(Link):
    """w stored as a float of 8 block_bytes bits. `weight` has nothing to weigh."""

    name: str
    ggml_type: int
    block_bytes: int
    block: int = 1
    tile: int = 1
    row_wise: bool = True

    @property
    def about(self) -> str:
        return {"F32": "32-bit floats", "F16": "16-bit floats", "BF16": "bfloat16"}[self.name]

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.block_bytes

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        return {}

    def nearest(self, scales: Scales, w: Array) -> Array:
        """The bits of the nearest stored float, on integers: XLA would drop a pair of casts."""
        if self.name == "F16":
            return fp16_bits(w)
        bits = lax.bitcast_convert_type(w, jnp.uint32)
        if self.name == "F32":
            return bits
        rounded = (bits + (jnp.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return jnp.where(jnp.isnan(w), (bits >> 16) | 64, rounded).astype(jnp.uint16)

    def decode(self, scales: Scales, codes: Array) -> Array:
        if self.name == "F16":
            return lax.bitcast_convert_type(codes.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
        bits = codes.astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << 16 if self.name == "BF16" else bits, jnp.float32)

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        return {}, self.nearest({}, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return jnp.ones((*shape[:-1], 1), jnp.float32), None

    def level(self, u: Array) -> Array:
        return self.decode({}, self.nearest({}, u))

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return scales

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        return {"blocks": lax.bitcast_convert_type(codes.astype(self._stored), jnp.uint8)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        return {}, lax.bitcast_convert_type(leaves["blocks"], self._stored)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return leaves["blocks"].shape[:-1]

    @property
    def _stored(self) -> type:
        return jnp.uint32 if self.block_bytes == 4 else jnp.uint16


FORMATS = (Dense("F32", 0, 4), Dense("F16", 1, 2), Dense("BF16", 30, 2))
