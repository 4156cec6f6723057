"""x as a matrix unit takes it: as numbers of 16 bits that add up to it, or as bytes under one scale a row.

    x = x_1 + x_2 + x_3          float32 has 24 bits, a bfloat16 8: three of them are x, exactly; two are a float16
    x = 2^e (x_1 + x_2 + x_3)    in float16, where weights have more than a bfloat16's bits
    x ~ a q                      a = absmax / 127,  q = round(x / a)

The parts are more rows of the batch. A batch of one or two fills a tile no further with three parts than with one, so
that float32 inputs cost nothing there, and lose nothing.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.storage import stored
from qjax.typing import Array, Float, Integer

PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float16): 2, jnp.dtype(jnp.float32): 3}
"""How many bfloat16 add up to a number of a type."""


def parts(x: Float[Array, "m in"]) -> Float[Array, "parts_m in"]:
    """bf16 rows, those of the largest parts first; `whole` adds what is made of them.

    Args:
      x: bf16, f16 or f32. Parts below float32's smallest normal number are lost.

    Source: Henry, Tang and Heinecke, arXiv:1904.06376, section II.
    """
    if x.dtype == jnp.bfloat16:
        return x
    rest, found = x.astype(jnp.float32), []
    for _ in range(PARTS[x.dtype]):
        found.append(stored(rest, "bf16"))  # a pair of casts would be dropped
        rest = rest - found[-1]
    return jnp.concatenate(found).astype(jnp.bfloat16)


def halves(x: Float[Array, "m in"]) -> tuple[Float[Array, "parts_m in"], Float[Array, "m 1"]]:
    """f16 rows and the powers of two that they are to be multiplied with.

    Args:
      x: bf16 and f16, one part; f32, three. What is below 2^-39 of the largest of a row is rounded to that.
    """
    count = 3 if x.dtype == jnp.float32 else 1
    rest = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.max(jnp.abs(rest), axis=-1, keepdims=True), jnp.int32)
    exponent = jnp.clip(bits >> 23, 15, 254)  # with its bias of 127; the largest shall have 2^14
    up, down = (lax.bitcast_convert_type(e << 23, jnp.float32) for e in (268 - exponent, exponent - 14))
    rest, found = rest * up, []
    for _ in range(count):
        found.append(stored(rest, "f16"))
        rest = rest - found[-1]
    return jnp.concatenate(found).astype(jnp.float16), down


def whole(y: Float[Array, "parts_m out"], m: int) -> Float[Array, "m out"]:
    """The sum of the products of all parts, the smallest first."""
    *larger, total = y.reshape(-1, m, y.shape[-1])
    for part in reversed(larger):
        total = total + part
    return total


def unfit(dtype: Any) -> str:
    """Why x of a type has no parts; "" where it has."""
    return "" if jnp.dtype(dtype) in PARTS else f"x is {jnp.dtype(dtype).name}, not bfloat16, float16 or float32"


def check_signs(signs: Any, n: int) -> None:
    """Raise UserError unless there is a sign for each of n columns."""
    if signs.shape != (n,):
        raise UserError(f"signs of shape {list(signs.shape)} for x of {n} columns; expected [{n}]: signs(seed, {n})")


def crowded(rows: int, dtype: Any) -> str:
    """Why x has no `halves` for a kernel of up to 64 rows; "" where it has."""
    most = 64 // 3 if jnp.dtype(dtype) == jnp.float32 else 64
    return unfit(dtype) or ("" if 0 < rows <= most else f"{rows} rows of {jnp.dtype(dtype).name}, not 1 to {most}")


def rounded(x: Float[Array, "m in"]) -> tuple[Integer[Array, "m in"], Float[Array, "m"]]:
    """int8 inputs and their scales.

    Args:
      x: inputs, one row a token.

    Returns: q in [-127, 127] and a in float32, 1 where the row is zero, no number where it has none.

    Source: the dynamic per-token rounding of LLM.int8(), arXiv:2208.07339, section 2, without outliers.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1)
    a = jnp.where(absmax == 0, 1.0, absmax / 127)
    q = lax.round(x / a[:, None], lax.RoundingMethod.TO_NEAREST_EVEN)
    return jnp.clip(q, -127, 127).astype(jnp.int8), a
