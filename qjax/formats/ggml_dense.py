"""The float types of GGUF files as formats with blocks of one weight, so that every GGUF tensor is a QTensor.

    type   B   bytes   field, little-endian
    F32    1   4       float32, bit for bit
    F16    1   2       IEEE half, to nearest even; beyond 65504 it overflows to infinity
    BF16   1   2       the upper half of a float32, to nearest even

No scales. Codes are the stored bit patterns: uint32 for F32, uint16 for the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.fields import Blocks
from qjax.formats.grid import GGML, Scaling
from qjax.formats.protocol import Scales
from qjax.formats.storage import fp16_bits


@dataclasses.dataclass(frozen=True)
class Floats:
    """All numbers of a float type, as levels; codes are their bits, on integers: XLA would drop a pair of casts."""

    kind: str

    def round(self, u: Array) -> tuple[Array, Array]:
        code = self._nearest(u)
        return self.value(code), code

    def _nearest(self, u: Array) -> Array:
        if self.kind == "F16":
            return fp16_bits(u)
        bits = lax.bitcast_convert_type(u, jnp.uint32)
        if self.kind == "F32":
            return bits
        rounded = (bits + (jnp.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
        return jnp.where(jnp.isnan(u), (bits >> 16) | 64, rounded).astype(jnp.uint16)

    def value(self, codes: Array) -> Array:
        if self.kind == "F16":
            return lax.bitcast_convert_type(codes.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
        bits = codes.astype(jnp.uint32)
        return lax.bitcast_convert_type(bits << 16 if self.kind == "BF16" else bits, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Unscaled(Scaling):
    """Weights are levels: s = 1, and nothing is stored of it. `weight` has nothing to weigh."""

    block: int = 1

    def fit(self, levels: Any, w: Array, weight: Array | None) -> Scales:
        return {}

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return jnp.ones((*shape[:-1], 1), jnp.float32), None

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return scales

    def neighbours(self, scales: Scales) -> tuple[Scales, ...]:
        return ()

    def units(self, scales: Scales, x: Array) -> Array:
        return x

    def weights(self, scales: Scales, T: Array) -> Array:
        return T


@dataclasses.dataclass(frozen=True)
class Whole:
    """A field of one code, all its bytes."""

    size: int

    def write(self, numbers: dict[str, Array]) -> Array:
        return lax.bitcast_convert_type(numbers["q"][..., 0].astype(self._type), jnp.uint8)

    def read(self, raw: Array) -> dict[str, Array]:
        return {"q": lax.bitcast_convert_type(raw, self._type)[..., None]}

    @property
    def _type(self) -> Any:
        return jnp.uint32 if self.size == 4 else jnp.uint16


def _dense(name: str, number: int, size: int, about: str) -> GGML:
    return GGML(name, Floats(name), Unscaled(), Blocks(number, 1, (Whole(size),)), about)


FORMATS = (
    _dense("F32", 0, 4, "32-bit floats"),
    _dense("F16", 1, 2, "16-bit floats"),
    _dense("BF16", 30, 2, "bfloat16"),
)
