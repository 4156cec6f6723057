"""What integers are worth to an entropy coder, column by column, in bits a weight.

    entropy   H(z_j) = - sum_z p_j(z) log2 p_j(z), p_j how often z stands in column j: what no coder goes below, and few
              rows look less random than they are
    coded     - mean_i log2 P_j(z_ij),  P_j(z) = Phi((z + 1/2) / sigma_j) - Phi((z - 1/2) / sigma_j): what an arithmetic
              coder takes that is told sigma_j^2 = E z_ij^2, with 16 bits for each sigma_j and each spacing

The second can be written down; the difference is what the first leaves out. Both are rates of codes that have no fixed
size, and are never to stand beside bits of a stored format.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from qjax.typing import Array, Float, Integer

SIDE = 32
"""Bits told for a column: its spacing and its sigma, fp16 both."""
_LEAST = 0.05  # of sigma, where all of a column is 0


def entropy(codes: Integer[Array, "rows n"]) -> Float[Array, "n"]:
    """Of each column, from the counts of its integers; jittable whatever they are."""
    z = jnp.sort(codes, axis=0).astype(jnp.int32)
    rows = z.shape[0]
    first, last = (jax.vmap(lambda c, s=s: jnp.searchsorted(c, c, side=s), 1, 1)(z) for s in ("left", "right"))
    return jnp.log2(jnp.float32(rows)) - jnp.mean(jnp.log2((last - first).astype(jnp.float32)), axis=0)


def coded(codes: Integer[Array, "rows n"]) -> Float[Array, "n"]:
    """Bits a weight of each column under a rounded normal distribution of its size, what is told of it included."""
    z = codes.astype(jnp.float32)
    sigma = jnp.maximum(jnp.sqrt(jnp.mean(z * z, axis=0, keepdims=True)), _LEAST)
    # The upper tail of |z| - 1/2 less that of |z| + 1/2, in logarithms: far out both are nothing in float32.
    near, far = (log_ndtr((shift - jnp.abs(z)) / sigma) for shift in (0.5, -0.5))
    log_p = near + jnp.log1p(-jnp.exp(jnp.minimum(far - near, -1e-7)))
    return -jnp.mean(log_p, axis=0) / jnp.log(2.0) + SIDE / z.shape[0]
