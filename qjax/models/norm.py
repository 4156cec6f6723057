"""RMSNorm: y = x / sqrt(mean x^2 + eps) * gain (arXiv:1910.07467), computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def unit(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean x^2 + eps) along the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean x^2 + eps) * (scale + offset) / divisor, computed in float32."""

    eps: float
    offset: float = 0.0
    divisor: float = 1.0

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = unit(x.astype(jnp.float32), self.eps)
        y = y * (scale.astype(jnp.float32) + self.offset)[(None,) * (x.ndim - 1)]
        return (y if self.divisor == 1.0 else y / self.divisor).astype(x.dtype)
