"""The kernel: y^T = W x^T for few rows of x, tile by tile, W decoded from planes of words on its way.

    for a step of columns:   P_g = sum_{k in g} T'[n, k] x[m, k]              tensor cores, T' from registers
                             acc += s_g P_g + o_g X_g                         X_g = sum_{k in g} x[m, k]
    o = s (c - z),  s c + m,  or nothing where the format has no offset

T' and the products are exact in bfloat16 x bfloat16 -> float32, and scales go onto float32 sums: the result differs
from the dense product by the rounding of sums alone. Rows of the weights are wgmma's 64 rows, x its narrow side: a
batch of 8 costs what a batch of 1 does. Splits of the columns are programs of their own, added by XLA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.layouts.planar import ROWS, Planar
from qjax.kernels.layouts.planes import SPLIT, WORD
from qjax.kernels.layouts.scales import entries, scale_and_offset
from qjax.kernels.mosaic_gpu.machines import Decode, Machine, Term
from qjax.kernels.mosaic_gpu.tiles import Plan
from qjax.typing import Array, Float

_REGISTERS = 32  # of a thread, for sums under way


def run(
    x: Float[Array, "batch K"],
    sums: Float[Array, "G batch"],
    packed: Planar,
    plan: Plan,
    decode: Decode,
    machine: Machine,
) -> Float[Array, "split N batch"]:
    """The partial products of each split.

    Args:
      x: bf16, padded to the plan's batch and the packed columns.
      sums: f32, X of the module's docstring, of a step's columns where a group has more; not read where the coding
        has no offset.
    """
    N, K = packed.padded
    code, shape = packed.coding, (ROWS, plan.batch)
    bits = [plane for plane, _ in SPLIT[code.bits]]
    groups = max(plan.columns // packed.group, 1)
    each = plan.columns // packed.run // groups
    under_way = max(1, min(groups, _REGISTERS // (plan.batch // 2)))
    steps = K // plan.columns // plan.split

    def kernel(*refs: Any, staged: Any) -> None:
        *inputs, out = refs
        rows, part = lax.axis_index("rows"), lax.axis_index("split")

        def body(_: Any, *tiles_and_sum: Any) -> Any:
            *tiles, acc = tiles_and_sum
            x_tile, scales = tiles[len(bits)], dict(zip(packed.scales, tiles[len(bits) + 1 :], strict=False))

            @cache
            def words(plane: int, block: int) -> Any:
                return tiles[plane].at[:, pl.ds(block * packed.run, packed.run)][...]

            def term(first: int) -> Term:
                parts = [
                    ([words(p, run // (WORD // plane)) for p, plane in enumerate(bits)], run)
                    for run in range(first, first + each)
                ]
                return partial(machine.decode, decode, parts), x_tile, first * packed.run

            for first in range(0, groups, under_way):
                some = range(first, min(first + under_way, groups))
                terms = [[term(g * each)] for g in some]
                for g, product in zip(some, machine.products(terms, shape), strict=True):
                    s, o = scale_and_offset(code, lambda key, g=g: _row(scales[key], g, groups))
                    acc += product * lax.broadcast_in_dim(s, shape, (0,))
                    if o is not None:
                        X = lax.broadcast_in_dim(tiles[-1][g], shape, (1,))
                        acc += lax.broadcast_in_dim(o, shape, (0,)) * X
            return acc

        staged[...] = plgpu.emit_pipeline(
            body,
            grid=(steps,),
            max_concurrent_steps=plan.stages,
            init_carry=machine.zeros(shape),
            in_specs=_specs(packed, plan, rows, part * steps),
        )(*inputs)
        keep(staged, out, rows, part)

    return launched(kernel, N, plan, machine)(
        *packed.planes, x, *packed.scales.values(), *([sums] if code.ranged else [])
    )


def _specs(packed: Planar, plan: Plan, rows: Any, base: Any) -> list[Any]:
    """The blocks of a step, in the order of the kernel's inputs."""
    K, columns = packed.padded[1], plan.columns

    def along(shape: tuple[int, int]) -> Any:
        return plgpu.BlockSpec(shape, lambda k: (rows, base + k), transforms=tiled(packed.run))

    def under(count: int, width: int, at: Any) -> Any:
        """`count` entries for all columns, of which a step needs some, or several steps one."""
        some = entries(count, K, columns)
        steps = K // columns * some // count
        return plgpu.BlockSpec((some, width), lambda k: (lax.div(base + k, jnp.int32(steps)), at))

    specs = [along((ROWS, words.shape[-1] * columns // K)) for words in packed.planes]
    specs.append(
        plgpu.BlockSpec((plan.batch, columns), lambda k: (0, base + k), transforms=tiled(min(packed.group, columns)))
    )
    specs += [under(x.shape[-2], ROWS, rows) for x in packed.scales.values()]
    if packed.coding.ranged:
        specs.append(under(K // min(packed.group, columns), plan.batch, 0))
    return specs


def tiled(columns: int) -> tuple[Any, Any]:
    """How a matrix lies in shared memory of which `columns` columns are read at a time: a power of two, 64, or more."""
    swizzle = plgpu.find_swizzle(min(columns, 64) * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def _row(ref: Any, group: int, groups: int) -> Any:
    """f32[N]: the entry of a group of the step."""
    return ref[group * ref.shape[0] // groups].astype(jnp.float32)


def keep(staged: Any, out: Any, rows: Any, part: Any) -> None:
    """Write a program's sums [ROWS, batch] into its place among all."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, out.at[part, pl.ds(rows * ROWS, ROWS), :])
    plgpu.wait_smem_to_gmem(0)


def launched(
    kernel: Callable[..., None], N: int, plan: Plan, machine: Machine, **scratch: Any
) -> Callable[..., Float[Array, "split N batch"]]:
    """The kernel over all rows and splits, as a function of its inputs.

    Args:
      kernel: (*inputs, out, staged=, **scratch), a program for ROWS rows of the weights and one split.
      N: rows of the weights.
      scratch: what a program has beside `staged`, f32[ROWS, batch] in shared memory.
    """
    return plgpu.kernel(  # type: ignore[no-any-return]
        kernel,
        out_type=jax.ShapeDtypeStruct((plan.split, N, plan.batch), jnp.float32),
        grid=(N // ROWS, plan.split),
        grid_names=("rows", "split"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types={"staged": plgpu.SMEM((ROWS, plan.batch), jnp.float32), **scratch},
        interpret=machine.interpret,
    )
