"""The smallest of many numbers and which it is, as fast as a sum: what every search for a code ends with.

`argmin` compiles to a loop over single numbers on a CPU; a reduction of pairs that says itself what less means, with
the numbers side by side in the minor axis, to whole vectors: a tenth of the time.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from qjax.typing import Array, Float, Int


def smallest(x: Float[Array, "R *n"]) -> tuple[Float[Array, "*n"], Int[Array, "*n"]]:
    """The smallest along the first axis, and its place there; of equal ones the first or another, of NaN none."""

    def less(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        take = b[0] < a[0]
        return jnp.where(take, b[0], a[0]), jnp.where(take, b[1], a[1])

    at = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return lax.reduce((x, at), (jnp.float32(jnp.inf), jnp.int32(0)), less, (0,))
