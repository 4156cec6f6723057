"""Rotary positions: the halves of each head, or neighbours in it, turn by position times frequency.

    f_i = theta^(-2i/d) / divisor_i

Source: RoFormer, arXiv:2104.09864, section 3.4.2; the divisors' are `RopeScaling`'s.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax.models.config import RopeScaling

STILL = 1e30
"""Divides a frequency to what is none at any position."""


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None, length: Any = 0) -> jax.Array:
    """Rotary angles per position, f_i = theta^(-2i/dim), rescaled for long contexts. Returns f32[dim/2]."""
    f = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return f if scaling is None else f / rope_divisors(dim, theta, scaling, length)


def rope_divisors(dim: int, theta: float, scaling: RopeScaling, length: Any = 0) -> jax.Array:
    """What long-context scaling divides each rotary frequency by: f32[dim/2].

    For Llama 3 with wavelengths l_i = 2 pi / f_i, b_i = clip((original / l_i - low) / (high - low), 0, 1):
    1 / divisor_i = (1 - b_i) / factor + b_i. GGUF files store this as the tensor `rope_freqs.weight`. YaRN's b falls
    along i, from where a wave turns beta_fast times to where it turns beta_slow times. LongRoPE asks for the `length`
    of the text so far. A proportional one has `STILL` where nothing turns, as llama.cpp's files have.
    """
    if scaling.kind == "linear":
        return jnp.full(dim // 2, scaling.factor, jnp.float32)
    if scaling.kind == "table":
        return jnp.array(scaling.divisors, jnp.float32)
    if scaling.kind == "longrope":
        long, short = (jnp.array(d, jnp.float32) for d in (scaling.divisors, scaling.short_divisors))
        return jnp.where(jnp.asarray(length) > scaling.original_max_position, long, short)
    if scaling.kind == "proportional":
        return jnp.where(jnp.arange(dim // 2) < int(scaling.part * dim // 2), scaling.factor, STILL)
    if scaling.kind == "yarn":

        def place(turns: float) -> float:
            return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = place(scaling.beta_fast), place(scaling.beta_slow)
        first, last = (math.floor(first), math.ceil(last)) if scaling.truncate else (first, last)
        first, last = max(first, 0), min(last, dim - 1)
        along = (jnp.arange(dim // 2, dtype=jnp.float32) - first) / max(last - first, 0.001)
        blend = 1 - jnp.clip(along, 0.0, 1.0)
    else:
        f = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        blend = jnp.clip((scaling.original_max_position * f / (2 * jnp.pi) - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - blend) / scaling.factor + blend)


def rotate(
    x: jax.Array, positions: jax.Array, frequencies: jax.Array, factor: float = 1.0, pairs: bool = False
) -> jax.Array:
    """Rotate the halves of each head by position * frequency (the Hugging Face convention).

    Args:
      x: [batch, length, heads, head_dim].
      positions: i32[length].
      frequencies: f32[rotated / 2]; the rest of a head stays as it is.
      factor: what the rotated part is multiplied with (YaRN, LongRoPE).
      pairs: rotate neighbours with each other in place of halves.
    """
    n = 2 * frequencies.shape[0]
    if n < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :n], positions, frequencies, factor, pairs), x[..., n:]], axis=-1)
    angle = positions[:, None].astype(jnp.float32) * frequencies[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    y = x.astype(jnp.float32)
    a, b = (y[..., 0::2], y[..., 1::2]) if pairs else jnp.split(y, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    y = jnp.stack([a, b], axis=-1).reshape(x.shape) if pairs else jnp.concatenate([a, b], axis=-1)
    return y.astype(x.dtype)
