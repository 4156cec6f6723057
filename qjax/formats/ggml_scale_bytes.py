"""Scales of one byte, as FP4 types have them: E8M0, a power of two, and unsigned E4M3, on integers throughout.

e8m0    2^(e - 128); 0xFF is NaN              ue4m3   2^(x - 8) (1 + m / 8), half of what OCP's E4M3 is; 0xFF is NaN
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats import exact
from qjax.formats.fields import merge, split

INFINITY, QUIET = 0x7F800000, 0x7FC00000  # the bits of infinity and of NaN
NAN = 0xFF  # the scale byte that is no number


@dataclasses.dataclass(frozen=True)
class ScaleBytes:
    """A field of `size` such scales."""

    of: str
    size: int
    kind: Literal["e8m0", "ue4m3"]

    def write(self, numbers: dict[str, Array]) -> Array:
        d = split(numbers[self.of], self.size)
        return (e8m0_byte(d) if self.kind == "e8m0" else ue4m3_byte(2 * d)).astype(jnp.uint8)

    def read(self, raw: Array) -> dict[str, Array]:
        byte = merge(raw.astype(jnp.int32))
        return {self.of: e8m0(byte) if self.kind == "e8m0" else ue4m3(byte)}


def assembled(field: Array, mantissa: Array) -> Array:
    """The bits of (1 + mantissa / 2^23) 2^(field - 127), denormal below field 1, infinite from 255."""
    shift = jnp.clip(1 - field, 0, 24)
    bits = jnp.where(field > 0, (field << 23) | mantissa, (mantissa | 0x00800000) >> shift)
    return jnp.where(field >= 255, INFINITY, bits)


def two_to(e: Array, t: float) -> Array:
    """The bits of t 2^(e - 128)."""
    bits = int(np.float32(t).view(np.int32))
    return assembled((bits >> 23) + e - 128, jnp.int32(bits & 0x7FFFFF))


def e8m0(e: Array) -> Array:
    """2^(e - 128) of an int32 exponent byte; NaN of 0xFF."""
    return lax.bitcast_convert_type(jnp.where(e == NAN, QUIET, two_to(e, 1.0)), jnp.float32)


def e8m0_byte(d: Array) -> Array:
    """The exponent byte of a scale 2^(e - 128): int32."""
    bits = exact.magnitude(d)
    e = jnp.where(bits >= 0x00800000, (bits >> 23) + 1, jnp.where(bits >= 0x00400000, 1, 0))
    return jnp.where(bits > INFINITY, NAN, e)


def ue4m3(byte: Array) -> Array:
    """Half the value of an unsigned E4M3 byte (int32, 0..255); of its two NaNs 0x7F is 0, as in ggml."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = lax.bitcast_convert_type(((exponent + 119) << 23) | (mantissa << 20), jnp.float32)
    value = jnp.where(exponent > 0, normal, mantissa.astype(jnp.float32) * 2.0**-10)
    return jnp.where(byte == 0x7F, 0.0, jnp.where(byte == NAN, jnp.nan, value))


def ue4m3_byte(x: Array) -> Array:
    """The nearest unsigned E4M3 byte, halves up, at most 448: f32 -> int32."""
    x = jnp.minimum(x, 448.0)
    small = jnp.minimum((x * 512.0 + 0.5).astype(jnp.int32), 7)
    bits = exact.magnitude(x)
    normal = ((bits + 0x00080000) >> 20) - (120 << 3)
    byte = jnp.where(x <= 0, 0, jnp.where((bits >> 23) <= 120, small, jnp.minimum(normal, 0x7E)))
    return jnp.where(bits > INFINITY, NAN, byte)


def _log2_rounds_up() -> np.ndarray:
    """How far below the next power of two (in float32 steps) log2f rounds to that power's exponent, by exponent field.

    C takes floor(log2f(absmax)), and log2f of numbers just below 2^k rounds to k.
    """
    step = np.arange(1, 128)
    k = np.arange(256)[:, None] - 126.0
    rounded = (np.log2(1 - step * 2.0**-24) + k).astype(np.float32)
    return np.asarray(np.sum(rounded >= k, axis=1), np.int32)


LOG2_ROUNDS_UP = _log2_rounds_up()
