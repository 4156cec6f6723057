"""Scales as files store them: rounded once to a storage type, and divided by as IEEE 754 says.

Compiled XLA turns x / y into x (1 / y) where y is a constant or a broadcast, two roundings instead of one, and may drop
a pair of casts. A barrier keeps the casts; a divisor that seems to depend on each x keeps the division. So a scale or a
code is the same number under jit, eagerly, and in another library.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from qjax.typing import Array

FLOATS = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}


def stored(x: Array, kind: str) -> Array:
    """f32 -> the nearest value of a storage type (ties to even, infinite beyond its largest) -> f32."""
    if kind == "f32":
        return x
    if kind == "bf16":
        return lax.reduce_precision(x, 8, 7)
    return lax.optimization_barrier(x.astype(jnp.float16)).astype(jnp.float32)


def quotient(x: Array, y: Array | float | int) -> Array:
    """x / y with one rounding, f32; y broadcasts against x and is not 0."""
    return x / jnp.where(jnp.isnan(x), x, jnp.float32(y))
