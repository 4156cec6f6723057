"""The GPU kernels: against float64 in jax's interpreter, and compiled for an H100 where its compiler is at hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import products
import pytest

import qjax
from qjax.errors import UserError
from qjax.formats import format
from qjax.kernels.layouts.planar import prepack
from qjax.kernels.mosaic_gpu import Plan, matmul, plan_for, twin
from qjax.kernels.mosaic_gpu.product import accumulate
from qjax.kernels.mosaic_gpu.tiles import SHARED, shared

# (format, rows, columns, batch): ragged rows, columns that do not fill a block, one batch of each padding
CASES = [
    ("int4_g128", 70, 384, 1),
    ("Q8_0", 64, 544, 9),
    ("Q4_K", 130, 768, 3),
    ("Q3_K", 64, 512, 8),
    ("IQ4_NL", 1, 224, 2),
    ("Q6_K", 65, 256, 17),
    ("Q2_K", 64, 256, 64),
    ("Q5_K", 64, 768, 2),
    ("NF4", 64, 320, 3),
    ("uint4_g32", 66, 288, 4),
    ("uint4_g64_zf16", 64, 128, 2),
    ("uint8_g128", 64, 384, 2),
    ("int8_row", 64, 360, 3),
    ("uint4_row", 64, 80, 2),
    ("uint4_row", 64, 600, 2),  # three steps under one scale and zero point
    ("int3_g64_mid_mse", 64, 640, 2),
    ("uint2_g64", 64, 576, 5),
    ("int3_g128", 64, 640, 2),
    ("TQ2_0", 64, 512, 1),
    ("Q4_1", 64, 160, 2),
    ("MXFP4", 64, 96, 2),
    ("int3_g16_mse_u6x16", 64, 512, 2),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name, rows, columns, batch", CASES, ids=lambda v: str(v))
def test_sums_are_rounded_and_nothing_else(name, rows, columns, batch, rng):
    fmt, leaves = products.weights(rng, name, rows, columns)
    x, packed = products.inputs(rng, batch, columns), prepack(fmt, leaves)
    products.assert_rounded_sums(accumulate(x, packed, interpret=True), x, fmt, leaves)
    if name not in ("NF4",):  # whose levels the kernel has as bfloat16
        products.assert_rounded_sums(twin(x, packed), x, fmt, leaves)


def test_splits_add_up(rng):
    fmt, leaves = products.weights(rng, "Q4_0", 64, 768)
    x, packed = products.inputs(rng, 2, 768), prepack(fmt, leaves)
    split = Plan(batch=8, columns=128, stages=2, split=3)
    products.assert_rounded_sums(accumulate(x, packed, split, interpret=True), x, fmt, leaves)
    y = matmul(x, packed, split, interpret=True)
    assert y.dtype == jnp.bfloat16 and y.shape == (2, 64)


def test_float32_inputs_lose_nothing(rng):
    fmt, leaves = products.weights(rng, "Q4_K", 64, 256)
    x, packed = products.exact(rng, 2, 256), prepack(fmt, leaves)
    y = matmul(x, packed, interpret=True)
    assert y.dtype == jnp.float32 and np.any(x != x.astype(jnp.bfloat16).astype(jnp.float32))
    products.assert_rounded_sums(y, x, fmt, leaves)


def test_zero_weights_and_zero_scales(rng):
    w = jnp.zeros((64, 256)).at[3].set(1.0)
    packed = prepack(format("Q4_K"), qjax.quantize(w, "Q4_K").leaves)
    y = accumulate(products.inputs(rng, 2, 256), packed, interpret=True)
    assert not np.any(np.delete(np.asarray(y), 3, axis=1)) and np.all(np.asarray(y)[:, 3] != 0)


def shapes(name, rows, columns):
    w = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return jax.eval_shape(lambda w: prepack(format(name), qjax.quantize(w, name).leaves), w)


@pytest.mark.parametrize("name", ["int4_g128", "Q8_0", "Q5_K", "Q6_K", "uint2_g64", "int8_row"])
def test_plans_fit(name):
    for rows, columns in ((64, 512), (576, 1536), (4096, 14336), (28672, 8192), (100, 576 if "row" in name else 2304)):
        packed = shapes(name, rows, columns)
        for batch in (1, 8, 33, 64):
            plan = plan_for(batch, packed)
            N, K = packed.padded
            assert plan.batch % 8 == 0 and plan.batch - batch < 8 and K % (plan.columns * plan.split) == 0
            assert shared(packed, plan) <= SHARED and plan.split * N // 64 <= max(512, N // 64)
    assert plan_for(8, shapes("int4_g128", 8192, 8192)).split == 4  # as measured: 512 programs


def test_what_does_not_fit_is_refused():
    packed, x = shapes("int4_g128", 64, 8192), jax.ShapeDtypeStruct((64, 8192), jnp.bfloat16)
    wide = Plan(batch=64, columns=2048, stages=4, split=1)
    with pytest.raises(UserError, match=r"bytes of shared memory, and a program has 232448"):
        jax.eval_shape(lambda x, packed: matmul(x, packed, wide), x, packed)
    with pytest.raises(UserError, match="columns times split a divisor of 8192"):
        jax.eval_shape(lambda x, packed: matmul(x, packed, dataclasses.replace(wide, split=3)), x, packed)
    for bad in ((65, 8192), (8, 4096)):
        with pytest.raises(UserError, match=r"65 rows of bfloat16, not 1 to 64|takes x \[m, 8192\], got \[8, 4096\]"):
            jax.eval_shape(matmul, jax.ShapeDtypeStruct(bad, jnp.bfloat16), packed)
    with pytest.raises(UserError, match="22 rows of float32, not 1 to 21"):
        jax.eval_shape(matmul, jax.ShapeDtypeStruct((22, 8192), jnp.float32), packed)


# Registers of a thread, and SASS instructions for a weight in the main loop, as they stand at batch 8, 8192 x 8192: a
# step up is a reason to look. Registers are the more of what jax 0.10 and 0.11 take.
CEILINGS = {
    "int4_g128": (196, 2.2),
    "Q4_0": (168, 2.95),
    "Q8_0": (128, 4.0),
    "int8_g128": (128, 3.3),
    "Q4_K": (128, 4.95),
    "Q2_K": (148, 5.3),
    "Q3_K": (214, 4.8),
    "Q5_K": (240, 5.45),
    "Q6_K": (138, 6.1),
    "IQ4_NL": (178, 6.7),
    "uint2_g64": (240, 2.65),
    "int3_g128": (240, 2.9),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CEILINGS)
def test_compiled_for_an_h100(name, h100):
    """No spills, registers and instructions under their ceilings, and no temporaries but the splits' sums."""
    packed = shapes(name, 8192, 8192)
    leaves, tree = jax.tree.flatten(packed)
    x = jax.ShapeDtypeStruct((8, 8192), jnp.bfloat16)
    plan = plan_for(8, packed)
    made = h100(lambda x, *leaves: accumulate(x, jax.tree.unflatten(tree, leaves)), x, *leaves)
    sums = 4 * 8 * 8192 // packed.group if packed.coding.ranged else 0
    assert made.temporary <= 4 * 8 * plan.split * 8192 + sums + 4096
    registers, instructions = CEILINGS[name]
    assert not made.spilled and made.registers <= registers
    assert made.main_loop * 128 / (64 * plan.columns) <= instructions
