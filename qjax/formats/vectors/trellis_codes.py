"""What the states of a trellis stand for: hashes that look like normal numbers, computed and not looked up.

    1mad    u = 34038481 s + 76625530             (sum of the 4 bytes of u - 510) / 147.8
    3inst   u = 89226354 s + 64248484             the two halves of (u & 0x8FFF8FFF) ^ 0x3B603B60 as f16, added
    mul1    u = 0x83DCD12D s                      (sum of the 4 bytes of u - 510) / 147.7
    hyb     u = s (s + 1)                         two numbers: entry (u >> 6) mod 512 of a table, the first -x if bit 15

all modulo 2^32. hyb's table here are 512 points of a spiral, turned by the golden angle, of a normal's radii:

    (|r cos t|, r sin t),   r_i = sqrt(-2 log(1 - (i + 1/2) / 512)),   t_i = pi (3 - sqrt 5) i

Sources: QTIP, arXiv:2406.11235, section 3.1 (1MAD, 3INST, HYB, whose table is fitted there by k-means); mul1 is EXL3's
(turboderp-org/exllamav3, codebook.cuh): affine in a sum of bytes, which integer dot products add up by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.typing import Array, Float, Shaped


def mad1(s: Shaped[Array, "*s"]) -> Float[Array, "*s 1"]:
    """1MAD: u32 states to values."""
    return _bytes_summed(s * jnp.uint32(34038481) + jnp.uint32(76625530), 147.8)


def mul1(s: Shaped[Array, "*s"]) -> Float[Array, "*s 1"]:
    """EXL3's default."""
    return _bytes_summed(s * jnp.uint32(0x83DCD12D), 147.7)


def inst3(s: Shaped[Array, "*s"]) -> Float[Array, "*s 1"]:
    """3INST."""
    u = s * jnp.uint32(89226354) + jnp.uint32(64248484)
    u = (u & jnp.uint32(0x8FFF8FFF)) ^ jnp.uint32(0x3B603B60)
    return (_half(u) + _half(u >> 16))[..., None]


def hyb(s: Shaped[Array, "*s"]) -> Float[Array, "*s 2"]:
    """HYB: two values a state."""
    u = s * (s + jnp.uint32(1))
    pair = jnp.asarray(spiral())[(u >> 6) & 511]
    return pair * jnp.stack([1.0 - 2.0 * ((u >> 15) & 1).astype(jnp.float32), jnp.ones(s.shape, jnp.float32)], axis=-1)


@cache
def spiral() -> np.ndarray:
    """The table of hyb, f32[512, 2]."""
    i = np.arange(512)
    r, t = np.sqrt(-2 * np.log1p(-(i + 0.5) / 512)), np.pi * (3 - np.sqrt(5)) * i
    return np.stack([np.abs(r * np.cos(t)), r * np.sin(t)], axis=1).astype(np.float32)


CODES: dict[str, tuple[Callable[[Array], Array], int]] = {
    "1mad": (mad1, 1),
    "3inst": (inst3, 1),
    "mul1": (mul1, 1),
    "hyb": (hyb, 2),
}
"""By name: states u32[*s] to values f32[*s, V], and V."""


def _bytes_summed(u: Array, unit: float) -> Array:
    total = sum(((u >> shift) & 255).astype(jnp.float32) for shift in (8, 16, 24)) + (u & 255).astype(jnp.float32)
    return ((total - 510.0) * (1.0 / unit))[..., None]


def _half(u: Array) -> Array:
    return lax.bitcast_convert_type(u.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
