"""y = x W^T for packed W, on a TPU.

    y[m, n] = sum_k x[m, k] w_hat[n, k]        w4a16, w8a16        x as it is, bfloat16
                                               w4a8, w8a8          x rounded to int8, one scale a row

float32 inputs are three bfloat16 parts each, more rows of the batch, and lose nothing.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.kernels import inputs
from qjax.kernels.layouts import fits
from qjax.kernels.layouts.columns import Columns, prepack, unpack
from qjax.kernels.layouts.scales import up
from qjax.kernels.mosaic_tpu import kernel
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
      x: bf16, f16 or f32[m, in].
      packed: weights (out, in) from `layouts.columns.prepack`.
      plan: tiles other than those that `plan_for` chooses, for all parts of x.
      input_bits: 16, or 8 to round x to int8 first, which changes the result.
      interpret: run the kernel as jnp, for tests.

    Returns: [m, out] of x's type, accumulated in float32; int8 inputs are multiplied and added in int32 within a group.

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
    m, size = _check(x, packed, input_bits), input_bits // 8
    x, a = inputs.rounded(x) if input_bits == 8 else (inputs.parts(x), None)
    batch = x.shape[0]
    plan = plan_for(batch, packed, size) if plan is None else check(packed, plan, size)
    K, _ = packed.padded
    x = jnp.pad(x, ((0, up(batch, plan.batch) - batch), (0, K - packed.columns)))
    groups = max(plan.inputs // packed.group, 1)
    sums = x.astype(jnp.float32).reshape(x.shape[0], K // plan.inputs, groups, -1).sum(axis=-1).swapaxes(0, 1)
    y = kernel.run(x, sums, packed, plan, interpret)[:batch, : packed.rows]
    return inputs.whole(y, m) if a is None else y * a[:, None]


def twin(x: Float[Array, "m in"], packed: Columns, input_bits: int = 16) -> Float[Array, "m out"]:
    """`accumulate` as jnp writes it, from the same bits by the format's own decode: f32[m, out]."""
    _check(x, packed, input_bits)
    w = packed.format.decode(*packed.format.unpack(unpack(packed)))
    if input_bits == 16:
        return jnp.dot(x.astype(jnp.float32), w.T, precision="highest")
    q, a = inputs.rounded(x)
    return jnp.dot(q.astype(jnp.float32), w.T, precision="highest") * a[:, None]


def unfit(format: Format, shape: tuple[int, ...], rows: int, dtype: Any) -> str:
    """Why the kernel cannot take a product; "" where it can.

    Args:
      format: of the weights.
      shape: theirs, (out, in).
      rows: of x; any.
      dtype: of x.
    """
    return inputs.unfit(dtype) or fits.unfit(prepack, format, shape)


def _check(x: Array, packed: Columns, input_bits: int) -> int:
    """Rows of x."""
    if packed.codes.ndim != 2:
        raise UserError(f"a kernel takes one matrix, got a stack of {packed.format.name}; scan over it")
    if input_bits not in (8, 16):
        raise UserError(f"input_bits must be 8 or 16, got {input_bits}")
    if x.ndim != 2 or x.shape[1] != packed.columns or x.shape[0] == 0:
        raise UserError(f"a kernel of these weights takes x [m, {packed.columns}], got {list(x.shape)}")
    if inputs.unfit(x.dtype):
        raise UserError(f"the kernel does not take this x: {inputs.unfit(x.dtype)}")
    return x.shape[0]
