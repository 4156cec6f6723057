"""y = x W^T for a few rows of x and W of vector codes, on a Hopper GPU: E8P and trellises.

    y[m, n] = s_n sum_k x[m, k] p[n, k]

Points enter as float16, in which those of all codes are exact but hyb's, and x as float16 under a power of two a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.formats.vectors.grid import VectorGrid
from qjax.formats.vectors.trellis import Trellis
from qjax.kernels import inputs
from qjax.kernels.layouts.points import Points, unpack
from qjax.kernels.mosaic_gpu.machines import Simulated, Warpgroup
from qjax.kernels.mosaic_gpu.matrices import dense, rows_of
from qjax.kernels.mosaic_gpu.tiles import Plan, check, plan_for
from qjax.kernels.mosaic_gpu.vectors import kernel, lattice, trellis
from qjax.kernels.mosaic_gpu.vectors.code import Code
from qjax.typing import Array, Float


def matmul(
    x: Float[Array, "m in"], packed: Points, plan: Plan | None = None, interpret: bool = False
) -> Float[Array, "m out"]:
    """x times packed weights, on an sm_90 GPU.

    Args:
      x: bf16[m, in] or f16, m from 1 to 64; f32, up to 21.
      packed: weights (out, in) from `layouts.points.prepack`.
      plan: tiles other than those that `plan_for` chooses, for all parts of x.
      interpret: run jax's interpreter instead of a GPU, for tests.

    Returns: [m, out] of x's type, accumulated in float32.

    Raises:
      UserError: another type or shape of x, a stack of matrices, a code that has no decode, or tiles that do not fit
        into shared memory.
    """
    return accumulate(x, packed, plan, interpret).astype(x.dtype)


def accumulate(
    x: Float[Array, "m in"], packed: Points, plan: Plan | None = None, interpret: bool = False
) -> Float[Array, "m out"]:
    """`matmul` before it is rounded to x's type: f32[m, out]."""
    m, code = _check(x, packed), decoder(packed.format)
    x, unit = inputs.halves(x)
    batch = x.shape[0]
    plan = plan_for(batch, packed, code.wide) if plan is None else check(packed, plan, code.wide)
    x = jnp.pad(x, ((0, plan.batch - batch), (0, packed.padded[1] - packed.columns)))
    machine = Simulated() if interpret else Warpgroup()
    splits = kernel.run(kernel.placed(x, code), packed, code, plan, machine)
    centers = code.center * x.astype(jnp.float32).sum(axis=-1, keepdims=True)
    y = inputs.whole((code.unit * splits.sum(axis=0).T[:, : packed.rows] + centers)[:batch], m)
    return y * unit * packed.scale.astype(jnp.float32).T


def twin(x: Float[Array, "m in"], packed: Points) -> Float[Array, "m out"]:
    """`accumulate` as jnp writes it, from the same bits by the format's own decode: f32[m, out]."""
    _check(x, packed)
    return dense(x, packed.format, unpack(packed))


def unfit(format: Format, shape: tuple[int, ...], rows: int, dtype: Any) -> str:
    """Why the kernel cannot take a product; "" where it can.

    Args:
      format: of the weights.
      shape: theirs, (out, in).
      rows: of x.
      dtype: of x.
    """
    if not isinstance(format, VectorGrid):
        return "its codes are no vectors under a scale of each row"
    try:
        decoder(format)
    except UserError as error:
        return str(error)
    matrix = "" if len(shape) == 2 else f"a kernel takes a matrix (rows, columns), got {format.name} of shape {shape}"
    return matrix or inputs.crowded(rows, dtype)


@cache
def decoder(format: VectorGrid) -> Code:
    """How a format's units become pairs of float16.

    Raises:
      UserError: no decode is written for its code.
    """
    return trellis.code(format.code) if isinstance(format.code, Trellis) else lattice.code(format.code)


def _check(x: Array, packed: Points) -> int:
    """Rows of x."""
    return rows_of(x, packed, packed.words, inputs.crowded(x.shape[0], x.dtype))
