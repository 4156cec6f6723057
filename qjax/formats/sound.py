"""NaN and Inf among the weights: the block that holds one decodes to NaN, whatever the format's search made of it.

    scales' = NaN where any weight under a scale is not finite, else scales

A search compares errors, and no comparison with NaN holds, so left alone it ends with finite scales, and training that
has diverged looks sound. Every storage type of a scale has a NaN (f16, bf16, f32; E8M0 and E4M3 byte 0xFF), so files
keep the mark. Formats without scales store each weight as it is.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Format, Scales
from qjax.typing import Array, Float


def encode(fmt: Format, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> tuple[Scales, Array]:
    """`fmt.encode`, marked: what is stored of w."""
    scales, codes = lax.optimization_barrier(fmt.encode(w, weight))  # its bytes do not depend on what follows
    return marked(scales, w), codes


def marked(scales: Scales, w: Float[Array, "*b n"]) -> Scales:
    """The scales with NaN wherever a weight that they stand for is NaN or infinite."""
    finite = jnp.isfinite(w)

    def mark(scale: Array) -> Array:
        parts = list(zip(scale.shape, w.shape, strict=False))
        if not jnp.issubdtype(scale.dtype, jnp.floating) or scale.ndim != w.ndim or any(n % k for k, n in parts):
            return scale  # integers under a scale that is marked; what no even part of w stands for
        groups = finite.reshape([size for k, n in parts for size in (k, n // k)])
        return jnp.where(jnp.all(groups, axis=tuple(range(1, 2 * w.ndim, 2))), scale, jnp.nan)

    return {name: mark(scale) for name, scale in scales.items()}


def overflowed(scales: Scales) -> Array:
    """Whether a scale went beyond its storage type, or was marked."""
    floats = [s for s in scales.values() if jnp.issubdtype(s.dtype, jnp.floating)]
    return jnp.any(jnp.asarray([jnp.any(~jnp.isfinite(s)) for s in floats], bool))
