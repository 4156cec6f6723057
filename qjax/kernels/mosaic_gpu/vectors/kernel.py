"""The kernel of vector codes: y^T = W x^T for few rows of x, W decoded from its units' words on its way.

    acc += sum_terms factor (sum_runs pairs x')          x' = x by the code's places, float16

Scales are those of whole rows and go onto the sums behind it; all else is as in skeleton.py: 64 rows of weights a
program, decoded into registers, splits of the columns added by XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.kernels.layouts.planar import ROWS
from qjax.kernels.layouts.points import RUN, UNIT, Points
from qjax.kernels.mosaic_gpu.machines import Machine
from qjax.kernels.mosaic_gpu.skeleton import keep, launched, tiled
from qjax.kernels.mosaic_gpu.tiles import Plan
from qjax.kernels.mosaic_gpu.vectors.code import Code
from qjax.typing import Array, Float

_WAITING = 16  # runs whose pairs wait in registers together


def placed(x: Float[Array, "batch K"], code: Code) -> Float[Array, "batch wide_K"]:
    """x as the runs meet it: of each block of P units, two neighbours together, x at each run's places."""
    units = x.reshape(x.shape[0], -1, RUN // 2, 2 * UNIT)
    pairs = units[..., np.asarray(code.places)]
    if code.scales:
        pairs = pairs * jnp.asarray(code.scales, x.dtype).reshape(1, 1, 1, -1, 1)
    return pairs.swapaxes(-2, -3).reshape(x.shape[0], -1)


def run(
    x: Float[Array, "batch wide_K"], packed: Points, code: Code, plan: Plan, machine: Machine
) -> Float[Array, "split N batch"]:
    """The partial products of each split.

    Args:
      x: f16, of `placed`, padded to the plan's batch and the packed columns.
    """
    N, K = packed.padded
    shape, factors = (ROWS, plan.batch), [factor for _, factor in code.terms]
    steps, blocks = K // plan.columns // plan.split, plan.columns // packed.block
    together = max(_WAITING // len(code.terms), 1)

    def kernel(words_in: Any, x_in: Any, *refs: Any, staged: Any, **own: Any) -> None:
        *tables, out = refs
        table: Any = own.get("table")
        for source in tables:
            plgpu.copy_gmem_to_smem(source, table, own["filled"])
            plgpu.barrier_wait(own["filled"])
        rows, part = lax.axis_index("rows"), lax.axis_index("split")

        def body(_: Any, words: Any, x_tile: Any, acc: Any) -> Any:
            for block in range(blocks):
                first = block * packed.bits
                units = [words.at[:, pl.ds((first + k) * RUN, RUN)][...] for k in range(packed.bits)]
                units += [machine.above(units[-1])] if code.above else []
                for start in range(0, len(code.places), together):
                    parts = [(units, i) for i in range(start, start + together)]
                    first = (block * len(code.places) + start) * RUN
                    terms = [
                        [(partial(machine.decode, d, parts, jnp.float16, table), x_tile, first)] for d, _ in code.terms
                    ]
                    for factor, product in zip(factors, machine.products(terms, shape), strict=True):
                        acc += product if factor == 1.0 else product * factor
            return acc

        base = part * steps
        staged[...] = plgpu.emit_pipeline(
            body,
            grid=(steps,),
            max_concurrent_steps=plan.stages,
            init_carry=machine.zeros(shape),
            in_specs=[
                plgpu.BlockSpec(
                    (ROWS, plan.columns * packed.bits // UNIT), lambda k: (rows, base + k), transforms=tiled(RUN)
                ),
                plgpu.BlockSpec(
                    (plan.batch, plan.columns * code.wide), lambda k: (0, base + k), transforms=tiled(together * RUN)
                ),
            ],
        )(words_in, x_in)
        keep(staged, out, rows, part)

    table = jnp.asarray(np.array(code.table, np.uint32).reshape(-1, 128)) if code.table else None
    scratch = {}
    if table is not None:
        scratch = {"table": plgpu.SMEM(table.shape, jnp.uint32), "filled": plgpu.Barrier()}
    return launched(kernel, N, plan, machine, **scratch)(packed.words, x, *([] if table is None else [table]))
