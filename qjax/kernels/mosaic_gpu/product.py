"""y = x W^T for a few rows of x and packed W, on a Hopper GPU.

    y[m, n] = sum_k x[m, k] w_hat[n, k]

For generation: batch 1 to 64, where a product costs the bytes of its weights. Beyond that decode once and multiply.
float32 inputs are three bfloat16 parts each, more rows of the batch, and lose nothing.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax.numpy as jnp

from qjax.formats.protocol import Format
from qjax.kernels import inputs
from qjax.kernels.layouts import fits
from qjax.kernels.layouts.coding import Coding
from qjax.kernels.layouts.planar import Planar, prepack, unpack
from qjax.kernels.mosaic_gpu import integers, signed_bytes, skeleton, tables
from qjax.kernels.mosaic_gpu.machines import Decode, Simulated, Warpgroup
from qjax.kernels.mosaic_gpu.matrices import dense, rows_of
from qjax.kernels.mosaic_gpu.tiles import Plan, check, plan_for
from qjax.typing import Array, Float

BATCH = 64


def matmul(
    x: Float[Array, "m in"], packed: Planar, plan: Plan | None = None, interpret: bool = False
) -> Float[Array, "m out"]:
    """x times packed weights, on an sm_90 GPU.

    Args:
      x: bf16[m, in], m from 1 to 64; f16, up to 32; f32, up to 21.
      packed: weights (out, in) from `layouts.planar.prepack`.
      plan: tiles other than those that `plan_for` chooses, for all parts of x.
      interpret: run jax's interpreter instead of a GPU, for tests.

    Returns: [m, out] of x's type, accumulated in float32; x and scales enter as they are, levels as bfloat16.

    Raises:
      UserError: another type or shape of x, a stack of matrices, or tiles that do not fit into shared memory.

    Source: the skeleton follows CUTLASS's mixed-input GEMM for Hopper (weights as wgmma's register operand).
    """
    return accumulate(x, packed, plan, interpret).astype(x.dtype)


def accumulate(
    x: Float[Array, "m in"], packed: Planar, plan: Plan | None = None, interpret: bool = False
) -> Float[Array, "m out"]:
    """`matmul` before it is rounded to x's type: f32[m, out]."""
    m = _check(x, packed)
    x = inputs.parts(x)
    batch = x.shape[0]
    plan = plan_for(batch, packed) if plan is None else check(packed, plan)
    K = packed.padded[1]
    x = jnp.pad(x, ((0, plan.batch - batch), (0, K - packed.columns)))
    sums = x.astype(jnp.float32).reshape(plan.batch, -1, min(packed.group, plan.columns)).sum(axis=-1).T
    machine = Simulated() if interpret else Warpgroup()
    splits = skeleton.run(x, sums, packed, plan, decoder(packed.coding), machine)
    return inputs.whole(splits.sum(axis=0).T[:batch, : packed.rows], m)


def twin(x: Float[Array, "m in"], packed: Planar) -> Float[Array, "m out"]:
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
    return inputs.unfit(dtype) or _crowded(rows, dtype) or fits.unfit(prepack, format, shape)


def no_hopper(kind: str) -> str:
    """Why a GPU cannot run the kernel: wgmma is sm_90's alone. "" where it can.

    Args:
      kind: `device_kind` of a device, or of a mesh's abstract device.

    >>> no_hopper("NVIDIA H200"), no_hopper("NVIDIA A100-SXM4-80GB")
    ('', 'NVIDIA A100-SXM4-80GB is no Hopper')
    """
    return "" if re.search(r"\bG?H(100|200|800|20)\b", kind) else f"{kind} is no Hopper"


def decoder(code: Coding) -> Decode:
    """How codes become bfloat16 in registers."""
    if code.table:
        return partial(tables.decode, table=code.table)
    return signed_bytes.decode if code.bits == 8 else partial(integers.decode, bits=code.bits, low=code.low)


def _check(x: Array, packed: Planar) -> int:
    """Rows of x."""
    return rows_of(x, packed, packed.planes[0], inputs.unfit(x.dtype) or _crowded(x.shape[0], x.dtype))


def _crowded(rows: int, dtype: Any) -> str:
    most = BATCH // inputs.PARTS[jnp.dtype(dtype)]
    return "" if 0 < rows <= most else f"{rows} rows of {jnp.dtype(dtype).name}, not 1 to {most}"
