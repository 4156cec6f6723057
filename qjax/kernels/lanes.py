"""Products on a CPU with weights whose outputs lie side by side (layouts/lanes.py): decoded a strip at a time.

    y_N += x_K W_KN        W of some inputs K, for some outputs N: 1 MiB in float32, decoded where it lies in the cache

A row of x goes along the inputs, as the strip has them first: the product needs no turn of W.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.grid import Grid
from qjax.kernels.layouts.lanes import Lanes, stored
from qjax.kernels.layouts.scales import scale_and_offset
from qjax.kernels.xla import STRIP
from qjax.typing import Array, Float


def matmul(x: Float[Array, "m n"], packed: Lanes, format: Grid, precision: str | None = None) -> Float[Array, "m out"]:
    """x W^T in x's type, summed in float32.

    Args:
      x: any rows, f32, bf16 or f16.
      packed: one matrix.
      format: of the weights.
      precision: of the products, as `lax.dot_general` takes it.
    """
    out, _ = packed.shape
    width = min(out, STRIP // _block(packed))
    x32 = x.astype(jnp.float32)
    if width == out:
        return _summed(x32, packed, precision).astype(x.dtype)

    def step(i: Array, y: Array) -> Array:  # the last columns begin early where they would not be full
        start = jnp.minimum(i * width, out - width)
        some = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, width, axis=1), packed)
        return lax.dynamic_update_slice_in_dim(y, _summed(x32, some, precision), start, axis=1)

    y = lax.fori_loop(0, -(-out // width), step, jnp.zeros((len(x), out), jnp.float32))
    return y.astype(x.dtype)


def _block(packed: Lanes) -> int:
    """Inputs that have whole entries of all scales, but for those that a row has one of."""
    n = packed.shape[-1]
    return max((packed.run, *(n // a.shape[0] for a in packed.scales.values() if a.shape[0] > 1)))


def _summed(x: Array, packed: Lanes, precision: str | None) -> Array:
    """x W^T, of some inputs after others."""
    out, n = packed.shape
    block = _block(packed)
    most = max(1, STRIP // (out * block))
    size = block * next(d for d in range(most, 0, -1) if n // block % d == 0)

    def step(i: Array, y: Array) -> Array:
        def some(a: Array) -> Array:
            rows = a.shape[0] * size // n
            return lax.dynamic_slice_in_dim(a, i * rows, rows) if a.shape[0] > 1 else a

        w = decoded(jax.tree.map(some, packed))
        part = lax.dynamic_slice_in_dim(x, i * size, size, axis=1)
        return y + jnp.matmul(part, w, precision=precision)

    return lax.fori_loop(0, n // size, step, jnp.zeros((len(x), out), jnp.float32))


def decoded(packed: Lanes) -> Float[Array, "K N"]:
    """The weights of a matrix, inputs first."""
    u = stored(packed).reshape(-1, packed.run, packed.shape[-2])

    def read(name: str) -> Any:
        a = packed.scales[name].astype(jnp.float32)
        return jnp.repeat(a, len(u) // len(a), axis=0)[:, None]

    s, o = scale_and_offset(packed.coding, read)
    T = packed.coding.values(u)
    w = s * T if o is None else s * T + o
    return w.reshape(-1, packed.shape[-2])
