"""The kernel: y = x W tile by tile, W as integers of 2, 4 or 8 bits, x as bfloat16 or int8.

    for a step of inputs:   P_g = x_g T'_g                    matrix unit; float32 sums, or int32 where x is int8
                            acc += s_g P_g + o_g X_g          X_g = sum of x over g
    o = s (c - z),  s c + m,  or nothing where the format has no offset

Scales go onto sums, so the matrix unit sees what is stored: that takes fewer instructions than scaling the weights, and
rounds less. Instructions a step (bundles) of 16 x 1024 x 512 are listed in tests/kernels/test_mosaic_tpu.py.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.kernels.layouts.columns import Columns
from qjax.kernels.layouts.scales import entries, scale_and_offset
from qjax.kernels.mosaic_tpu.tiles import Plan
from qjax.typing import Array, Float, Shaped


def run(
    x: Shaped[Array, "batch K"], sums: Float[Array, "steps batch G"], packed: Columns, plan: Plan, interpret: bool
) -> Float[Array, "batch N"]:
    """The product, in float32.

    Args:
      x: bf16 or int8, padded to the plan's batch and the packed inputs.
      sums: f32, X of each step's groups; not read where the coding has no offset.
    """
    (batch, K), N = x.shape, packed.padded[1]
    groups = max(plan.inputs // packed.group, 1)
    width = plan.inputs // groups
    code = packed.coding
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    kind = x.dtype

    def kernel(x_ref: Any, codes_ref: Any, *refs: Any) -> None:
        *others, out_ref, acc_ref = refs
        scales = dict(zip(packed.scales, others, strict=False))

        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc = acc_ref[...]
        for g in range(groups):
            part = slice(g * width, g * width + width)
            # bf16 and int8 are multiplied exactly; "highest", which a caller may have set, is for float32 and fails.
            product = lax.dot(
                x_ref[:, part],
                codes_ref[part, :].astype(kind),
                precision=lax.Precision.DEFAULT,
                preferred_element_type=jnp.int32 if integers else jnp.float32,
            )
            s, o = scale_and_offset(code, lambda key, g=g: _row(scales[key], g, groups))
            acc += product.astype(jnp.float32) * s
            if o is not None:
                acc += others[-1][0, :, g : g + 1] * o
        acc_ref[...] = acc

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            out_ref[...] = acc_ref[...]

    return pl.pallas_call(
        kernel,
        grid=(batch // plan.batch, N // plan.outputs, K // plan.inputs),
        name=f"matmul_{packed.bits}_{jnp.dtype(kind).name}",
        interpret=interpret,
        in_specs=_specs(packed, plan, groups),
        out_specs=pl.BlockSpec((plan.batch, plan.outputs), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((batch, N), jnp.float32),
        scratch_shapes=[pltpu.VMEM((plan.batch, plan.outputs), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(x, packed.codes, *packed.scales.values(), *([sums] if code.ranged else []))


def _specs(packed: Columns, plan: Plan, groups: int) -> list[pl.BlockSpec]:
    """The blocks of a step, in the order of the kernel's inputs."""
    K, inputs = packed.padded[0], plan.inputs

    def under(count: int) -> pl.BlockSpec:
        """`count` entries for all inputs, of which a step needs some, or several steps one."""
        some = entries(count, K, inputs)
        steps = K // inputs * some // count
        return pl.BlockSpec((some, 1, plan.outputs), lambda i, j, k: (lax.div(k, jnp.int32(steps)), 0, j))

    specs = [
        pl.BlockSpec((plan.batch, inputs), lambda i, j, k: (i, k)),
        pl.BlockSpec((inputs, plan.outputs), lambda i, j, k: (k, j)),
        *(under(x.shape[-3]) for x in packed.scales.values()),
    ]
    if packed.coding.ranged:
        specs.append(pl.BlockSpec((1, plan.batch, groups), lambda i, j, k: (k, i, 0)))
    return specs


def _row(ref: Any, group: int, groups: int) -> Any:
    """f32[1, outputs]: the entry of a group of the step."""
    return ref[group * ref.shape[0] // groups].astype(jnp.float32)
