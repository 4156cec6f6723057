"""Scales as files store them: rounded once to a storage type, and divided by as IEEE 754 says.

Compilers take liberties with both. XLA drops a pair of casts (on a GPU always, through bitcasts too), so rounding is
done on the bits, as integers. It turns x / y into x (1 / y) where y is a constant or a broadcast, two roundings instead
of one, and a GPU's division is up to two units off in its last place. So the divisor seems to depend on each x, and
away from the CPU the quotient is set right by integer long division. A scale or a code is then the same number under
jit, eagerly, on every device and in another library.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.typing import Array

FLOATS = {"f16": jnp.float16, "bf16": jnp.bfloat16, "f32": jnp.float32}


def fp16_bits(x: Array) -> Array:
    """The bits of the nearest fp16 (ties to even; subnormals kept; overflow to inf; NaN stays NaN): f32 -> u16.

    >>> [hex(b) for b in fp16_bits(jnp.array([1.0, -2.0**-24, 65519.0, 65520.0])).tolist()]
    ['0x3c00', '0x8001', '0x7bff', '0x7c00']
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    size = bits & 0x7FFFFFFF
    # Normal numbers drop 13 bits of the mantissa and 112 of the exponent's bias; a carry runs into the exponent.
    normal = (size - (112 << 23) + 0x0FFF + ((size >> 13) & 1)) >> 13
    # Below 2^-14 the unit is 2^-24: the whole mantissa moves right by 126 - exponent places, 14 to 25.
    places = jnp.clip(126 - (size >> 23).astype(jnp.int32), 14, 25).astype(jnp.uint32)
    mantissa = (size & 0x7FFFFF) | 0x800000
    kept = mantissa >> places
    subnormal = (mantissa + (jnp.uint32(1) << (places - 1)) - 1 + (kept & 1)) >> places
    special = jnp.where(size > 0x7F800000, 0x7E00 | ((size >> 13) & 0x3FF), 0x7C00)
    half = jnp.where(size < (113 << 23), subnormal, jnp.where(size >= 0x477FF000, special, normal))
    return (half | ((bits >> 16) & 0x8000)).astype(jnp.uint16)


def fp16(x: Array) -> Array:
    """The nearest fp16, as an array of that type, in every program: f32 -> f16."""
    return lax.bitcast_convert_type(fp16_bits(x), jnp.float16)


def round_fp16(x: Array) -> Array:
    """f32 -> the nearest fp16 (as `fp16_bits` says) -> f32. The barrier keeps it from being repeated for each use."""
    return lax.optimization_barrier(fp16(x)).astype(jnp.float32)


def stored(x: Array, kind: str) -> Array:
    """f32 -> the nearest value of a storage type (ties to even, infinite beyond its largest) -> f32."""
    if kind == "f32":
        return x
    return lax.reduce_precision(x, 8, 7) if kind == "bf16" else round_fp16(x)


@jax.jit
def quotient(x: Array, y: Array | float | int) -> Array:
    """x / y with one rounding, f32; y broadcasts against x and is not 0. Numbers below 2^-126 count as zero."""
    return lax.platform_dependent(x, jnp.asarray(y, jnp.float32), cpu=_divided, default=_corrected)


def reciprocal(y: Array, least: float = 0.0) -> Array:
    """1 / y with one rounding, and 0 where |y| is not above `least`."""
    ok = jnp.abs(y) > least
    return jnp.where(ok, quotient(jnp.float32(1), jnp.where(ok, y, 1.0)), 0.0)


def over(x: Array, y: Array) -> Array:
    """x / y with one rounding, and 0 where y is; y broadcasts against x."""
    return jnp.where(y == 0, 0.0, quotient(x, jnp.where(y == 0, 1.0, y)))


def _divided(x: Array, y: Array) -> Array:
    return x / jnp.where(jnp.isnan(x), x, y)


def _corrected(x: Array, y: Array) -> Array:
    """The device's own quotient decides what is not finite or zero, and is where the long division starts."""
    a, b = (lax.bitcast_convert_type(v, jnp.int32) for v in jnp.broadcast_arrays(x, y))
    m, n = ((v & 0x7FFFFF) | 0x800000 for v in (a, b))
    guess = m.astype(jnp.float32) / n.astype(jnp.float32)
    return long_division(a, b, m, n, guess)


def long_division(a: Array, b: Array, m: Array, n: Array, guess: Array) -> Array:
    """The float32 nearest to the quotient of two, ties to even, from one that is at most four units off.

    Args:
      a, b: the bits of dividend and divisor, i32.
      m, n: their mantissas, 2^23 to 2^24.
      guess: m / n, about.

    The quotient's 24 bits q and what they leave, r = 2^s m - q n with |r| < 2^27, need no more than integers modulo
    2^32; q is right where 0 <= r < n.
    """
    s = 23 + (m < n).astype(jnp.int32)
    q = (guess * jnp.where(m < n, 2.0**24, 2.0**23)).astype(jnp.int32)
    r = (m << s) - q * n
    off = sum((r >= i * n).astype(jnp.int32) for i in range(1, 6)) - sum(
        (r < -i * n).astype(jnp.int32) for i in range(5)
    )
    q, r = q + off, r - off * n
    q += ((2 * r > n) | ((2 * r == n) & ((q & 1) == 1))).astype(jnp.int32)  # 2^24 carries into the exponent
    up, down = (a >> 23) & 0xFF, (b >> 23) & 0xFF
    field = up - down + 126 - (s - 23) + (q >> 23)
    bits = jnp.where(field <= 0, 0, jnp.where(field >= 255, 0x7F800000, (field << 23) | (q & 0x7FFFFF)))
    bits = jnp.where((up == 0) | (down == 255), 0, bits)  # 0 / y and x / inf
    bits = jnp.where((down == 0) | (up == 255), 0x7F800000, bits)  # x / 0 and inf / y
    nan = (_is_nan(a) | _is_nan(b)) | ((up == 0) & (down == 0)) | ((up == 255) & (down == 255))
    bits = jnp.where(nan, 0x7FC00000, bits | ((a ^ b) & jnp.int32(-(2**31))))
    return lax.bitcast_convert_type(bits, jnp.float32)


def _is_nan(bits: Array) -> Array:
    return (bits & 0x7FFFFFFF) > 0x7F800000


def stored_bytes(leaf: Any) -> int:
    """Bytes of an array as a device holds it: two int4 in one."""
    integers = jnp.issubdtype(leaf.dtype, jnp.integer)
    bits = jnp.iinfo(leaf.dtype).bits if integers else 8 * leaf.dtype.itemsize
    return -(-math.prod(leaf.shape) * bits // 8)
