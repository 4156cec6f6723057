"""x as bytes under one scale a row, so that the matrix unit multiplies integers.

x_hat = a q        a = absmax / 127,  q = round(x / a)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from qjax.typing import Array, Float, Integer


def rounded(x: Float[Array, "m in"]) -> tuple[Integer[Array, "m in"], Float[Array, "m"]]:
    """int8 inputs and their scales.

    Args:
      x: inputs, one row a token.

    Returns: q in [-127, 127] and a in float32, 1 where the row is zero.

    Source: the dynamic per-token rounding of LLM.int8() (arXiv:2208.07339, section 2), without outliers.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1)
    a = jnp.where(absmax > 0, absmax / 127, 1.0)
    q = lax.round(x / a[:, None], lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.clip(q, -127, 127).astype(jnp.int8), a
