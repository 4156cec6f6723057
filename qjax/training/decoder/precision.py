"""Mixed precision: bfloat16 operands, float32 accumulation, in the forward and in the backward products."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x, w, dimension_numbers):
    return lax.dot_general(x, w, dimension_numbers, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, w, dimension_numbers):
    return _dot(x, w, dimension_numbers), (x, w)


def _backward(dimension_numbers, residuals, g):
    x, w = residuals
    ((_, (cw,)), _) = dimension_numbers
    g = g.astype(x.dtype)
    # dx = g w^T and dw = x^T g, over all batch axes of x; w is (in, out) or, contracted on axis 1, (out, in).
    dx = lax.dot_general(g, w, (((g.ndim - 1,), (1 - cw,)), ((), ())), preferred_element_type=jnp.float32)
    batch = tuple(range(x.ndim - 1))
    dw = lax.dot_general(x, g, ((batch, batch), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), (dw if cw == 0 else dw.T).astype(w.dtype)


_dot.defvjp(_forward, _backward)


def mixed_dot_general(x, w, dimension_numbers, precision=None, preferred_element_type=None, **_):
    """`lax.dot_general` of activations [..., k] with a matrix, for use as a model's `dot_general`.

    All three products (forward, dx, dw) keep their operands in the input's type and accumulate in float32, which is
    what matrix units (TPU, tensor cores, AMX) do natively.
    """
    del precision, preferred_element_type
    ((cx, cw), (bx, bw)) = dimension_numbers
    if tuple(cx) != (x.ndim - 1,) or w.ndim != 2 or bx or bw:
        raise ValueError(
            f"mixed_dot_general is for [..., k] times a matrix, got {x.shape} {w.shape} {dimension_numbers}"
        )
    return _dot(x, w, ((tuple(cx), tuple(cw)), ((), ())))
