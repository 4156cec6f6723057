"""The kernel of super-blocks with integer scales: y^T = W x^T for few rows of x, scales multiplied into the codes.

    acc += d (sum (sc q) x')  -  dmin (sum mn X)        X = the sums of x of sixteen, as three float16

As skeleton.py in all else: 64 rows of weights a program, decoded into registers, splits of the columns added by XLA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.formats.storage import stored
from qjax.kernels.layouts.planar import ROWS
from qjax.kernels.layouts.supers import SUPER, UNIT, Supers
from qjax.kernels.mosaic_gpu.machines import Machine
from qjax.kernels.mosaic_gpu.skeleton import keep, launched, tiled
from qjax.kernels.mosaic_gpu.supers import decode
from qjax.kernels.mosaic_gpu.tiles import Plan
from qjax.typing import Array, Float

PARTS = 3
_SUMS = 2.0**-8
"""Of x's sums, that they are float16."""


def run(x: Float[Array, "batch K"], packed: Supers, plan: Plan, machine: Machine) -> Float[Array, "split N batch"]:
    """The partial products of each split, in units of 2^24.

    Args:
      x: f16, padded to the plan's batch and the packed columns.
    """
    N, K = packed.padded
    bits, shape, supers = packed.bits, (ROWS, plan.batch), plan.columns // SUPER
    steps = K // plan.columns // plan.split
    least = -1 / (_SUMS * (1.0 if bits == 4 else 16.0))

    def kernel(*refs: Any, staged: Any) -> None:
        *inputs, out = refs
        rows, part = lax.axis_index("rows"), lax.axis_index("split")

        def body(_: Any, words: Any, scales: Any, d: Any, dmin: Any, x_tile: Any, sums: Any, acc: Any) -> Any:
            for s in range(supers):
                if s % 2 == 0:
                    both = scales.at[:, pl.ds(s * 8, 16)][...]
                units = [words.at[:, pl.ds((s * bits + k) * UNIT, UNIT)][...] for k in range(bits)]
                units.append(machine.spread(both, s % 2, decode.selects(bits)))
                made = (
                    (decode.scaled, UNIT, x_tile, s * SUPER),
                    (decode.minima, PARTS, sums, s * PARTS * UNIT),
                )
                terms = []
                for of, count, ref, at in made:
                    runs = [(units, i) for i in range(count)]
                    terms.append([(partial(machine.decode, partial(of, bits=bits), runs, jnp.float16), ref, at)])
                for product, ref, factor in zip(machine.products(terms, shape), (d, dmin), (1.0, least), strict=True):
                    scale = ref[s].astype(jnp.float32) * factor
                    acc += product * lax.broadcast_in_dim(scale, shape, (0,))
            return acc

        base = part * steps

        def along(height: int, width: int, at: Any, columns: int) -> Any:
            return plgpu.BlockSpec((height, width), lambda k: (at, base + k), transforms=tiled(columns))

        under = plgpu.BlockSpec((supers, ROWS), lambda k: (base + k, rows))
        staged[...] = plgpu.emit_pipeline(
            body,
            grid=(steps,),
            max_concurrent_steps=plan.stages,
            init_carry=machine.zeros(shape),
            in_specs=[
                along(ROWS, plan.columns * bits // UNIT, rows, UNIT),
                along(ROWS, plan.columns // (2 * UNIT), rows, UNIT),
                under,
                under,
                along(plan.batch, plan.columns, 0, SUPER),
                along(plan.batch, supers * PARTS * UNIT, 0, UNIT),
            ],
        )(*inputs)
        keep(staged, out, rows, part)

    return launched(kernel, N, plan, machine)(
        packed.words, packed.scales, packed.d, packed.dmin, _placed(x, bits), _sums(x)
    )


def _placed(x: Float[Array, "batch K"], bits: int) -> Float[Array, "batch K"]:
    """x as runs meet it: weight i of all sixteen units of a super-block together, less by what its mask makes of it."""
    units = x.reshape(x.shape[0], -1, UNIT, UNIT).swapaxes(-1, -2)
    less = jnp.asarray([2.0 ** -decode.place(i, bits) for i in range(UNIT)], x.dtype)
    return (units * less.reshape(1, 1, -1, 1)).reshape(x.shape)


def _sums(x: Float[Array, "batch K"]) -> Float[Array, "batch sums"]:
    """The sums of units as parts, those of a super-block together."""
    rest = x.astype(jnp.float32).reshape(x.shape[0], -1, 1, UNIT, UNIT).sum(axis=-1) * _SUMS
    found = []
    for _ in range(PARTS):
        found.append(stored(rest, "f16"))
        rest = rest - found[-1]
    return jnp.concatenate(found, axis=-2).astype(jnp.float16).reshape(x.shape[0], -1)
