"""Randomized Hadamard transform and rounding to int8 in one pass over x, on a TPU.

    y = (x s) (H_b (x) L)^T / sqrt(n)        q = round(y / a),  a = max|y| / 127 of each row

The factor L of 128 or more is a product on the matrix unit, H_b of a power of two a butterfly of sums over whole
vectors: a butterfly within the lanes would turn them, and a product with all of H_n costs n multiplications an entry. x
is read once and a byte an entry written, where transform and rounding apart write and read four bytes more of each.

Bundles for 32 rows are listed in tests/kernels/test_tpu_hadamard.py.
Source: QuIP#, arXiv:2402.04396, section 3; the rounding is `inputs.rounded`'s.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qjax.errors import UserError
from qjax.kernels import inputs
from qjax.typing import Array, Float, Integer, Shaped

ROWS = 32
"""Of a step: a tile of int8."""
LANES = 128
VMEM = 1 << 24


def rotated(
    x: Float[Array, "m n"], signs: Float[Array, "n"], last: Shaped[Array, "L L"], interpret: bool = False
) -> tuple[Integer[Array, "m n"], Float[Array, "m"]]:
    """Codes and scales of x after the transform.

    Args:
      x: bf16, f16 or f32; float32 enters as three bfloat16, whose products are exact.
      signs: +-1, of `reparam.hadamard.signs`; of bfloat16 numbers.
      last: L, a Hadamard matrix, n / L a power of two; `reparam.hadamard.hadamard_matrix(L)`.
      interpret: run jax's interpreter instead of a TPU, for tests.

    Returns: int8[m, n] in [-127, 127] and f32[m]; y is about a q.

    Raises:
      UserError: L is no multiple of 128 lanes, n / L no power of two, x of another type or too wide for VMEM, or
        signs that are not one for each of its columns.
    """
    rows, n = x.shape
    count = _check(x, signs, last)
    x = inputs.parts(x).reshape(-1, rows, n)
    x = jnp.pad(x, ((0, 0), (0, -rows % ROWS), (0, 0)))
    q, a = _run(x, signs.astype(jnp.bfloat16)[None], last.astype(jnp.bfloat16), count, interpret)
    return q[:rows], a[:rows, 0]


def twin(
    x: Float[Array, "m n"], signs: Float[Array, "n"], last: Shaped[Array, "L L"]
) -> tuple[Integer[Array, "m n"], Float[Array, "m"]]:
    """`rotated` as jnp writes it, in float32: the transform whole, then the rounding."""
    count = _check(x, signs, last)
    y = (x.astype(jnp.float32) * signs[None]).reshape(x.shape[0], count, -1)
    y = jnp.matmul(y, last.astype(jnp.float32).T, precision="highest")
    return inputs.rounded(jnp.stack(_butterfly([y[:, i] for i in range(count)]), axis=1).reshape(x.shape) * _unit(x))


def _run(x: Array, signs: Array, last: Array, count: int, interpret: bool) -> tuple[Array, Array]:
    (parts, rows, n), L = x.shape, last.shape[0]

    def kernel(x_ref: Any, signs_ref: Any, last_ref: Any, q_ref: Any, a_ref: Any) -> None:
        # All blocks are rows of one product, for which the unit takes L once. +-x is exact, and so is x times +-1.
        at = [slice(i * L, i * L + L) for i in range(count)]
        stacks = (jnp.concatenate([x_ref[k, :, i] * signs_ref[:, i] for i in at]) for k in reversed(range(parts)))
        y = reduce(lambda total, part: total + part, (_product(stack, last_ref[...]) for stack in stacks))
        blocks = [y[i * ROWS : i * ROWS + ROWS] for i in range(count)]
        q, a = inputs.rounded(jnp.concatenate(_butterfly(blocks), axis=1) * (1.0 / math.sqrt(n)))
        q_ref[...], a_ref[...] = q, jnp.broadcast_to(a[:, None], a_ref.shape)

    return pl.pallas_call(
        kernel,
        grid=(rows // ROWS,),
        name=f"matmul_hadamard_{n}",
        interpret=interpret,
        in_specs=[
            pl.BlockSpec((parts, ROWS, n), lambda i: (0, i, 0)),
            pl.BlockSpec((1, n), lambda i: (0, 0)),
            pl.BlockSpec((L, L), lambda i: (0, 0)),
        ],
        out_specs=[pl.BlockSpec((ROWS, n), lambda i: (i, 0)), pl.BlockSpec((ROWS, LANES), lambda i: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.int8), jax.ShapeDtypeStruct((rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(x, signs, last)


def _product(x: Array, last: Array) -> Array:
    """x L^T, in float32."""
    dimensions = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, last, dimensions, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _butterfly(blocks: list[Array]) -> list[Array]:
    """H_b of b blocks, b a power of two, Sylvester's: log2(b) rounds of sums and differences."""
    half = len(blocks) // 2
    if not half:
        return blocks
    low, high = blocks[:half], blocks[half:]
    pairs = list(zip(low, high, strict=True))
    return _butterfly([a + b for a, b in pairs]) + _butterfly([a - b for a, b in pairs])


def _unit(x: Array) -> float:
    return 1.0 / math.sqrt(x.shape[-1])


def _check(x: Array, signs: Array, last: Array) -> int:
    """b."""
    n, L = x.shape[-1], last.shape[0]
    count = n // L
    why = inputs.unfit(x.dtype)
    if why:
        raise UserError(f"the transform does not take this x: {why}")
    inputs.check_signs(signs, n)
    if L % LANES or n % L or count & (count - 1):
        raise UserError(
            f"a transform of {n} needs a last factor that is a multiple of {LANES}, times a power of two; got {L}"
        )
    need = ROWS * n * (4 * inputs.PARTS[x.dtype] + 10) + 4 * L * L
    if need > VMEM:
        raise UserError(f"{ROWS} rows of {n} {x.dtype} and a factor of {L} need {need} bytes of VMEM, of {VMEM}")
    return count
