"""Products with packed weights in plain XLA; each wins somewhere (`qjax bench kernels`), and all take any batch of x.

    whole     y = x W^T, W decoded at once; a GPU's or a TPU's compiler decodes it as it multiplies, or stores it
    first     y = (W x^T)^T: a CPU's compiler would turn W in memory before it multiplies x with W^T
    strips    `first` of a few rows of W after another, decoded where they lie in the cache; `wide_strips` of more rows
    sums      y = sum_G s_G u_G sum_j c_Gj k_Gj + m_G sum_j x_Gj,   x_Gj ~ u_Gj k_Gj: whole numbers k, int32 sums

The last turns the one row of x into whole numbers of as many bits as a group's sum leaves of 31 (at least 20, where a
float32 has 24): CPUs add integers many at a time, where floats must be added in order.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.fields import Blocks
from qjax.formats.grid import Grid
from qjax.formats.levels import Integers
from qjax.formats.protocol import Format, Leaves
from qjax.typing import Array, Float, Shaped

STRIP = 1 << 18  # weights decoded at a time: 1 MiB in float32
LEAST_BITS = 20


def whole(
    x: Shaped[Array, "m n"], leaves: Leaves, format: Format, precision: str | None = None
) -> Shaped[Array, "m *o"]:
    """x W^T with W decoded to x's type, summed in float32.

    Args:
      x: [m, n].
      leaves: of weights [*o, n].
      format: of the leaves.
      precision: of the product, as `lax.dot_general` takes it.
    """
    w = format.decode(*format.unpack(leaves)).astype(x.dtype)
    dimensions = (((1,), (w.ndim - 1,)), ((), ()))
    y = lax.dot_general(x, w, dimensions, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def first(
    x: Shaped[Array, "m n"], leaves: Leaves, format: Format, precision: str | None = None
) -> Shaped[Array, "m *o"]:
    """`whole`, with W as the product's first operand."""
    return jnp.moveaxis(_first(format.decode(*format.unpack(leaves)), x, precision), -1, 0)


def _first(w: Array, x: Array, precision: str | None) -> Array:
    """W x^T in x's type, [*o, m]."""
    dimensions = (((w.ndim - 1,), (1,)), ((), ()))
    w = w.astype(x.dtype)
    return lax.dot_general(w, x, dimensions, precision=precision, preferred_element_type=jnp.float32).astype(x.dtype)


def strips(
    x: Shaped[Array, "m n"], leaves: Leaves, format: Format, precision: str | None = None, times: int = 1
) -> Shaped[Array, "m *o"]:
    """`first`, of about `times` STRIP weights at a time, rows that a tile spans together; the last strip begins early
    where it would not be full."""
    *outer, n = format.shape(leaves)
    out = math.prod(outer)
    size = min(out, max(1, times * STRIP // n // format.rows) * format.rows)
    if size == out:
        return first(x, leaves, format, precision)
    flat = jax.tree.map(lambda leaf: leaf.reshape(out, *leaf.shape[len(outer) :]), leaves)

    def step(k: Array, y: Array) -> Array:
        start = jnp.minimum(k * size, out - size)
        some = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), flat)
        found = _first(format.decode(*format.unpack(some)), x, precision)
        return lax.dynamic_update_slice_in_dim(y, found, start, 0)

    y = lax.fori_loop(0, -(-out // size), step, jnp.zeros((out, x.shape[0]), x.dtype))
    return y.T.reshape(x.shape[0], *outer)


wide_strips = partial(strips, times=16)
"""For the caches of accelerators: 8 MiB in bfloat16, whose kernels a shorter strip would not fill."""


def sums(x: Float[Array, "1 n"], leaves: Leaves, format: Grid, precision: str | None = None) -> Float[Array, "1 *o"]:
    """One row of x in whole numbers, against codes that are whole numbers; `sum_bits` says of how many bits.

    Each x is off by at most 2^-(bits + 1) of the largest of its group.
    """
    scales, codes = format.unpack(leaves)
    s, m = format.scaling.columns(scales, codes.shape)
    groups = s.shape[-1]
    x = x.reshape(groups, -1)
    unit = jnp.max(jnp.abs(x), axis=-1, keepdims=True) * 2.0 ** -sum_bits(format)
    k = jnp.where(unit == 0, 0.0, jnp.round(x / unit)).astype(jnp.int32)
    codes = codes.reshape(*codes.shape[:-1], groups, -1).astype(jnp.int32)
    k = k.reshape((1,) * (codes.ndim - 2) + k.shape)
    unit = unit.reshape((1,) * (s.ndim - 1) + (groups,))
    y = jnp.sum(jnp.sum(codes * k, axis=-1).astype(jnp.float32) * unit * s, axis=-1)
    if m is not None:
        y = y + jnp.sum(m * jnp.sum(x, axis=-1).reshape(unit.shape), axis=-1)
    return y[None]


def sum_bits(format: Grid) -> int:
    """Bits of x that an int32 sum over a group has room for, beside the codes."""
    assert isinstance(format.levels, Integers)
    largest = max(-format.levels.low, format.levels.high)
    return int(math.log2((2**31 - 1) / (largest * format.block)))


def by_rows(format: Format, shape: tuple[int, ...]) -> bool:
    """Whether a few rows of weights [*o, n] are decoded by what their leaves hold for them alone."""
    return format.rows > 0 and len(shape) > 1


def in_whole_numbers(format: Format) -> bool:
    """Whether `sums` takes a format: blocks of a file with one scale and codes in a row, which XLA unpacks as it adds;
    those of several fields, or of more groups, it would store unpacked first."""
    return (
        isinstance(format, Grid)
        and isinstance(format.layout, Blocks)
        and isinstance(format.levels, Integers)
        and format.block == 32
        and not format.levels.half
        and sum_bits(format) >= LEAST_BITS
    )
