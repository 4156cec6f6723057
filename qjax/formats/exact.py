"""Float32 arithmetic that gives C's bits under XLA.

Compiled XLA differs from C (built without contraction, as llama.cpp's x86 releases are) in three ways, and ggml's
encoders meet all of them:

* a*b + c becomes one fused multiply-add, past any barrier. `apart(a * b, limit)` puts a clip that never binds
  between the two, which LLVM cannot contract through.
* x / constant becomes x * (1 / constant): `storage.quotient` makes the divisor depend on data.
* denormals are flushed to zero. `lift` moves blocks of tiny numbers up by 2^64, through integers; every operation the
  encoders do afterwards is invariant to that power of two.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.storage import round_fp16

_TINY = 0x2F800000  # the bits of 2^-32: fp16 scales of blocks below are zero
_UP, _DOWN = 2.0**64, 2.0**-64
_UNIT, _PER_UNIT = 2.0 ** (64 - 149), 2.0 ** (149 - 64)  # a lifted block's smallest denormal


def apart(product: Array, limit: float) -> Array:
    """The product itself, kept from fusing with the addition that follows; |product| must stay below the limit."""
    return jnp.clip(product, -limit, limit)


def magnitude(x: Array) -> Array:
    """The bits of |x| as int32: ordered as |x| is, denormals included."""
    return lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def tiny(x: Array) -> Array:
    """Whether all of a block [*b, block] lies below 2^-32: bool[*b, 1]."""
    return jnp.max(magnitude(x), axis=-1, keepdims=True) < _TINY


def lift(x: Array, tiny: Array) -> Array:
    """x, times 2^64 in tiny blocks: f32[*b, block] and bool[*b, 1] -> f32[*b, block]."""
    mag = magnitude(x)
    denormal = mag.astype(jnp.float32) * _UNIT
    up = jnp.where(mag < 0x00800000, jnp.where(jnp.signbit(x), -denormal, denormal), x * _UP)
    return jnp.where(tiny, up, x)


def denormal_grid(x: Array, tiny: Array) -> Array:
    """Round a quotient of lifted numbers as C rounds it where it falls among the denormals."""
    return jnp.where(tiny, lax.round(x * _PER_UNIT, lax.RoundingMethod.TO_NEAREST_EVEN) * _UNIT, x)


def drop_fp16(x: Array, tiny: Array) -> Array:
    """A lifted number back at its place and rounded to fp16."""
    return round_fp16(jnp.where(tiny, x * _DOWN, x))
