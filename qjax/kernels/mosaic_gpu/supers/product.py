"""y = x W^T for a few rows of x and W of Q2_K or Q4_K, on a Hopper GPU.

    y[m, n] = sum_k x[m, k] (d sc q - dmin mn)[n, k]

sc q is exact in float16, and x enters as float16 under a power of two a row.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qjax.formats.protocol import Format
from qjax.kernels import inputs
from qjax.kernels.layouts import fits
from qjax.kernels.layouts.supers import NAMES, Supers, prepack, unpack
from qjax.kernels.mosaic_gpu.machines import Simulated, Warpgroup
from qjax.kernels.mosaic_gpu.matrices import dense, rows_of
from qjax.kernels.mosaic_gpu.supers import kernel
from qjax.kernels.mosaic_gpu.tiles import Plan, check, plan_for
from qjax.typing import Array, Float

_UNIT = 2.0**24
"""The inverse of float16's smallest."""


def matmul(
    x: Float[Array, "m in"], packed: Supers, plan: Plan | None = None, interpret: bool = False
) -> Float[Array, "m out"]:
    """x times packed weights, on an sm_90 GPU.

    Args:
      x: bf16[m, in] or f16, m from 1 to 64; f32, up to 21.
      packed: weights (out, in) from `layouts.supers.prepack`.
      plan: tiles other than those that `plan_for` chooses, for all parts of x.
      interpret: run jax's interpreter instead of a GPU, for tests.

    Returns: [m, out] of x's type, accumulated in float32.

    Raises:
      UserError: another type or shape of x, a stack of matrices, or tiles that do not fit into shared memory.
    """
    return accumulate(x, packed, plan, interpret).astype(x.dtype)


def accumulate(
    x: Float[Array, "m in"], packed: Supers, plan: Plan | None = None, interpret: bool = False
) -> Float[Array, "m out"]:
    """`matmul` before it is rounded to x's type: f32[m, out]."""
    m = _check(x, packed)
    x, unit = inputs.halves(x)
    batch = x.shape[0]
    plan = plan_for(batch, packed) if plan is None else check(packed, plan)
    x = jnp.pad(x, ((0, plan.batch - batch), (0, packed.padded[1] - packed.columns)))
    splits = kernel.run(x, packed, plan, Simulated() if interpret else Warpgroup())
    return inputs.whole(splits.sum(axis=0).T[:batch, : packed.rows] * _UNIT, m) * unit


def twin(x: Float[Array, "m in"], packed: Supers) -> Float[Array, "m out"]:
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
    if format.name not in NAMES:
        return f"it is none of {', '.join(NAMES)}"
    return inputs.crowded(rows, dtype) or fits.unfit(prepack, format, shape)


def _check(x: Array, packed: Supers) -> int:
    """Rows of x."""
    return rows_of(x, packed, packed.words, inputs.crowded(x.shape[0], x.dtype))
