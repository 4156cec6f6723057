"""The GPU kernel of Q2_K and Q4_K: integer scales multiplied into codes, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import products
import pytest
from counted import Counted
from jax import lax

import qjax
from qjax.errors import UserError
from qjax.kernels import Call, choice
from qjax.kernels.layouts.supers import NAMES, prepack, unpack
from qjax.kernels.mosaic_gpu.supers import decode, matmul, twin, unfit
from qjax.kernels.mosaic_gpu.supers.product import accumulate
from qjax.kernels.mosaic_gpu.tiles import Plan, plan_for
from qjax.kernels.mosaic_gpu.words import Arrays


@pytest.mark.parametrize("name, bits", [("Q2_K", 2.625), ("Q4_K", 4.625)])
def test_there_and_back_is_bit_for_bit(name, bits, rng):
    fmt = qjax.format(name)
    leaves = {"blocks": jnp.asarray(rng.integers(0, 256, (2, 5, 3, fmt.block_bytes), np.uint8) & 0xBF)}
    packed, back = jax.jit(lambda leaves: (packed := prepack(fmt, leaves), unpack(packed)))(leaves)
    assert packed.shape == (2, 5, 768) and packed.padded == (64, 1024) and packed.bits == fmt.levels.bits
    np.testing.assert_array_equal(back["blocks"], leaves["blocks"])
    whole = jax.eval_shape(lambda b: prepack(fmt, {"blocks": b}), jnp.zeros((64, 2, fmt.block_bytes), jnp.uint8))
    assert whole.bits_per_weight == bits


@pytest.mark.parametrize("bits", [2, 4])
def test_every_code_times_every_scale_is_exact(bits):
    scales, codes = (15, 15) if bits == 2 else (63, 63), np.arange(2**bits)
    sc = np.repeat(np.arange(scales[0] + 1), len(codes))
    q = np.tile(codes, scales[0] + 1)
    beside = sc | (sc[::-1] << (4 if bits == 2 else 8))
    held = jnp.asarray(beside | beside << 16, jnp.uint32)
    for run in range(16):
        per = 16 // bits
        word = jnp.asarray((q << bits * (run % per)) * 0x10001, jnp.uint32)
        words = [jnp.zeros_like(word)] * bits + [held]
        words[run // per] = word
        made = lax.bitcast_convert_type(decode.scaled(Arrays(), words, run, bits), jnp.float16)
        expected = (sc * q) * 2.0 ** (decode.place(run, bits) - 24)
        np.testing.assert_array_equal(made.astype(jnp.float32), np.stack([expected] * 2, axis=-1))
    made = lax.bitcast_convert_type(decode.minima(Arrays(), words, 0, bits), jnp.float16)
    expected = sc[::-1] * 2.0 ** ((4 if bits == 2 else 0) - 24)
    np.testing.assert_array_equal(made.astype(jnp.float32), np.stack([expected] * 2, axis=-1))


@pytest.mark.parametrize(
    "name, rows, columns, batch", [("Q2_K", 70, 768, 3), ("Q4_K", 64, 512, 9), ("Q4_K", 1, 256, 1)]
)
def test_sums_are_rounded_and_nothing_else(name, rows, columns, batch, rng):
    fmt, leaves = products.weights(rng, name, rows, columns)
    x, packed = products.inputs(rng, batch, columns), prepack(fmt, leaves)
    products.assert_rounded_sums(accumulate(x, packed, interpret=True), x, fmt, leaves)
    products.assert_rounded_sums(twin(x, packed), x, fmt, leaves)


def test_float32_inputs_lose_nothing_and_splits_add_up(rng):
    fmt, leaves = products.weights(rng, "Q2_K", 64, 1024)
    x, packed = products.exact(rng, 2, 1024) * jnp.array([[1e-25], [1e25]]), prepack(fmt, leaves)
    y = accumulate(x, packed, Plan(8, 512, 2, 2), interpret=True)
    want, size = products.product(x, fmt, leaves)
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= 2.0**-19 * size)  # a part less leaves 2^-17
    assert matmul(x.astype(jnp.bfloat16), packed, interpret=True).dtype == jnp.bfloat16


@pytest.mark.parametrize("bits, most", [(2, 1.2), (4, 1.3)])
def test_instructions_a_weight_are_those_of_the_budget(bits, most):
    ops, words = Counted(), [("w", k) for k in range(bits)] + [("scales",)]
    for run in range(16):
        decode.scaled(ops, words, run, bits)
        decode.minima(ops, words, run, bits)
    assert most - 0.1 < len(ops.made) / 32 <= most


CEILINGS = {"Q2_K": (128, 2.05), "Q4_K": (122, 2.65)}  # as of test_mosaic_gpu.py


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CEILINGS)
def test_compiled_for_an_h100(name, h100):
    """Without spills, under the ceilings, and no temporaries but x in runs and the sums of splits."""
    fmt, n = qjax.format(name), 8192
    blocks = jax.ShapeDtypeStruct((n, n // 256, fmt.block_bytes), jnp.uint8)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda b: prepack(fmt, {"blocks": b}), blocks))
    plan = plan_for(8, jax.tree.unflatten(tree, leaves))
    x = jax.ShapeDtypeStruct((8, n), jnp.bfloat16)
    made = h100(lambda x, *leaves: accumulate(x, jax.tree.unflatten(tree, leaves)), x, *leaves)
    assert made.temporary <= 4 * 8 * plan.split * n + 4 * 8 * n + 4096
    registers, instructions = CEILINGS[name]
    assert not made.spilled and made.registers <= registers
    assert made.main_loop * 128 / (64 * plan.columns) <= instructions


def test_what_the_table_says():
    bf16 = jnp.dtype(jnp.bfloat16)
    assert {n: choice(Call(qjax.format(n), (64, 512), 1, bf16), "cuda")[0].name for n in (*NAMES, "Q5_K")} == {
        "Q2_K": "mosaic_gpu_supers", "Q4_K": "mosaic_gpu_supers", "Q5_K": "mosaic_gpu",
    }  # fmt: skip
    assert unfit(qjax.format("Q4_K"), (64, 512), 22, jnp.float32) == "22 rows of float32, not 1 to 21"
    with pytest.raises(UserError, match=r"takes x \[m, 256\], got \[2, 512\]"):
        fmt = qjax.format("Q2_K")
        matmul(jnp.ones((2, 512)), prepack(fmt, {"blocks": jnp.zeros((64, 1, fmt.block_bytes), jnp.uint8)}))
    with pytest.raises(UserError, match="Q3_K has no layout of super-blocks"):
        prepack(qjax.format("Q3_K"), {})
