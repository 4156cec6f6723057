"""Randomized Hadamard transform and rounding to int8 in one kernel, on a Hopper GPU: both factors on the matrix unit.

    X = (x s) as 64 x C        Y = H_64 X L^T / sqrt(n)        q = round(Y / a),  a = max|Y| / 127

A program has one row of x. H_64 X is exact products in float32; as three bfloat16 it meets L, again without loss, from
the registers that it lies in: a butterfly would exchange them between threads, six times. Signs and the turn of X come
with the copy of x that is made anyway, as bfloat16 parts.

Source: QuIP#, arXiv:2402.04396, section 3; a transform as products on the matrix unit: HadaCore, arXiv:2412.08832; the
rounding is `inputs.rounded`'s.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.errors import UserError
from qjax.kernels import inputs
from qjax.kernels.mosaic_gpu.machines import Machine, Simulated, Warpgroup
from qjax.kernels.mosaic_gpu.skeleton import tiled
from qjax.typing import Array, Float, Integer, Shaped

SIDE = 64
"""Rows of X, those of wgmma."""
WIDEST = 128
"""C, for a tile of sums and three parts of another in registers."""


def rotated(
    x: Float[Array, "m n"], signs: Float[Array, "n"], last: Shaped[Array, "C C"], interpret: bool = False
) -> tuple[Integer[Array, "m n"], Float[Array, "m"]]:
    """Codes and scales of x after the transform.

    Args:
      x: bf16, f16 or f32.
      signs: +-1, of `reparam.hadamard.signs`.
      last: L, a Hadamard matrix of order C = n / 64, a multiple of 16 to 128; `reparam.hadamard.hadamard_matrix(C)`.
      interpret: run jax's interpreter instead of a GPU, for tests.

    Returns: int8[m, n] in [-127, 127] and f32[m]; the transform is about a q.

    Raises:
      UserError: no such C, x of another type, or signs that are not one for each of its columns.
    """
    (m, n), C = x.shape, last.shape[0]
    why = inputs.unfit(x.dtype)
    if why:
        raise UserError(f"the transform does not take this x: {why}")
    inputs.check_signs(signs, n)
    if n != SIDE * C or C % 16 or C > WIDEST:
        raise UserError(
            f"a transform of {n} is {SIDE} times a last factor of {n / SIDE:g}, a multiple of 16 up to {WIDEST}, "
            f"not of {C}"
        )
    parts = inputs.parts(x * signs.astype(x.dtype)[None]).reshape(-1, m, SIDE, C)
    turned = parts.transpose(1, 3, 0, 2).reshape(m * C, -1)  # the inputs of H_64 in a row, those of all parts
    q, a = _run(turned, last.astype(jnp.bfloat16), m, Simulated() if interpret else Warpgroup())
    return q.reshape(m, n), a[:, 0]


def _run(x: Array, last: Array, m: int, machine: Machine) -> tuple[Array, Array]:
    C, width = last.shape[0], x.shape[1]
    shape = (SIDE, C)
    row = jnp.arange(SIDE, dtype=jnp.int32)
    H = 1 - 2 * (lax.population_count(row[:, None] & row[None]) & 1)
    first = jnp.tile(H.astype(jnp.bfloat16), (1, width // SIDE))

    def kernel(
        x_in: Any, first_in: Any, last_in: Any, q_out: Any, a_out: Any,
        *, x_tile: Any, first_tile: Any, last_tile: Any, q_tile: Any, a_tile: Any, filled: Any,
    ) -> None:  # fmt: skip
        at = lax.axis_index("row")
        plgpu.copy_gmem_to_smem(x_in.at[pl.ds(at * C, C), :], x_tile, filled)
        plgpu.copy_gmem_to_smem(first_in, first_tile, filled)
        plgpu.copy_gmem_to_smem(last_in, last_tile, filled)
        plgpu.barrier_wait(filled)
        (half,) = machine.products([[(lambda: first_tile[...], x_tile, 0)]], shape)
        smallest_first = [(lambda part=part: part, last_tile, 0) for part in reversed(machine.split(half))]
        (y,) = machine.products([smallest_first], shape)
        y *= 1.0 / math.sqrt(SIDE * C)
        most = jnp.max(jnp.max(jnp.abs(y), axis=1))  # along rows first: a warpgroup has no other way to one number
        a = jnp.where(most == 0, 1.0, most / 127)
        q_tile[...] = lax.round(y / a, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int8)
        a_tile[...] = jnp.broadcast_to(a, a_tile.shape)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_tile, q_out.at[pl.ds(at * SIDE, SIDE), :])
        plgpu.copy_smem_to_gmem(a_tile, a_out.at[at])
        plgpu.wait_smem_to_gmem(0)

    def tile(rows: int, columns: int) -> Any:
        return plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=tiled(columns & -columns))

    return plgpu.kernel(
        kernel,
        out_type=(jax.ShapeDtypeStruct((m * SIDE, C), jnp.int8), jax.ShapeDtypeStruct((m, 128), jnp.float32)),
        grid=(m,),
        grid_names=("row",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types={
            "x_tile": tile(C, width),
            "first_tile": tile(SIDE, width),
            "last_tile": tile(C, C),
            "q_tile": plgpu.SMEM(shape, jnp.int8),
            "a_tile": plgpu.SMEM((128,), jnp.float32),
            "filled": plgpu.Barrier(num_arrivals=3),
        },
        interpret=machine.interpret,
    )(x, first, last)
