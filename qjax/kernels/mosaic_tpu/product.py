"""y = x W^T for packed W, on a TPU.

y[m, n] = sum_k x[m, k] w_hat[n, k]        w4a16, w8a16        x as it is, bfloat16
                                           w4a8, w8a8          x rounded to int8, one scale a row: twice the rate
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.kernels.layouts import fits
from qjax.kernels.layouts.columns import Columns, prepack, unpack
from qjax.kernels.layouts.scales import up
from qjax.kernels.mosaic_tpu import kernel
from qjax.kernels.mosaic_tpu.inputs import rounded
from qjax.kernels.mosaic_tpu.tiles import Plan, check, plan_for
from qjax.typing import Array, Float


def matmul(
    x: Float[Array, "m in"],
    packed: Columns,
    plan: Plan | None = None,
    input_bits: int = 16,
    interpret: bool = False,
) -> Float[Array, "m out"]:
    """x times packed weights, on a TPU.

    Args:
      x: bf16[m, in].
      packed: weights (out, in) from `layouts.columns.prepack`.
      plan: tiles other than those that `plan_for` chooses.
      input_bits: 16, or 8 to round x to int8 first, which changes the result.
      interpret: run the kernel as jnp, for tests.

    Returns: bf16[m, out], accumulated in float32; int8 inputs are multiplied and added in int32 within a group.

    Raises:
      UserError: another type or shape of x, a stack of matrices, or tiles that do not fit into VMEM.
    """
    return accumulate(x, packed, plan, input_bits, interpret).astype(x.dtype)


def accumulate(
    x: Float[Array, "m in"],
    packed: Columns,
    plan: Plan | None = None,
    input_bits: int = 16,
    interpret: bool = False,
) -> Float[Array, "m out"]:
    """`matmul` before it is rounded to x's type: f32[m, out]."""
    batch = _check(x, packed, input_bits)
    size = input_bits // 8
    plan = plan_for(batch, packed, size) if plan is None else check(packed, plan, size)
    K, _ = packed.padded
    x, a = rounded(x) if input_bits == 8 else (x, None)
    x = jnp.pad(x, ((0, up(batch, plan.batch) - batch), (0, K - packed.columns)))
    groups = max(plan.inputs // packed.group, 1)
    sums = x.astype(jnp.float32).reshape(x.shape[0], K // plan.inputs, groups, -1).sum(axis=-1).swapaxes(0, 1)
    y = kernel.run(x, sums, packed, plan, interpret)[:batch, : packed.rows]
    return y if a is None else y * a[:, None]


def twin(x: Float[Array, "m in"], packed: Columns, input_bits: int = 16) -> Float[Array, "m out"]:
    """`accumulate` as jnp writes it, from the same bits by the format's own decode: f32[m, out]."""
    _check(x, packed, input_bits)
    w = packed.format.decode(*packed.format.unpack(unpack(packed)))
    if input_bits == 16:
        return jnp.dot(x.astype(jnp.float32), w.T, precision="highest")
    q, a = rounded(x)
    return jnp.dot(q.astype(jnp.float32), w.T, precision="highest") * a[:, None]


def unfit(format: Format, shape: tuple[int, ...], rows: int, dtype: Any) -> str:
    """Why the kernel cannot take a product; "" where it can.

    Args:
      format: of the weights.
      shape: theirs, (out, in).
      rows: of x; any.
      dtype: of x.
    """
    return (
        fits.unfit(prepack, format, shape) if dtype == jnp.bfloat16 else f"x is {jnp.dtype(dtype).name}, not bfloat16"
    )


def _check(x: Array, packed: Columns, input_bits: int) -> int:
    """The batch."""
    if packed.codes.ndim != 2:
        raise UserError(f"a kernel takes one matrix, got a stack of {packed.format.name}; scan over it")
    if input_bits not in (8, 16):
        raise UserError(f"input_bits must be 8 or 16, got {input_bits}")
    if x.ndim != 2 or x.shape[1] != packed.columns or x.dtype != jnp.bfloat16 or x.shape[0] == 0:
        raise UserError(
            f"a kernel of {packed.format.name} takes bfloat16 [m, {packed.columns}], got {x.dtype}{list(x.shape)}"
        )
    return x.shape[0]
