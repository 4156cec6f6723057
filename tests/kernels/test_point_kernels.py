"""GPU kernels of vector codes: points of lattices and trellises, from bits to products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counted import Counted
from jax import lax

import qjax
from qjax.errors import UserError
from qjax.formats.vectors.trellis import trellis
from qjax.kernels import Call, choice
from qjax.kernels.layouts.points import RUN, UNIT, Points, prepack, unpack
from qjax.kernels.mosaic_gpu.tiles import Plan, plan_for
from qjax.kernels.mosaic_gpu.vectors import decoder, matmul, twin, unfit
from qjax.kernels.mosaic_gpu.vectors.product import accumulate
from qjax.kernels.mosaic_gpu.words import Arrays

TRELLISES = ["trellis2_L12_3inst", "trellis1_L9_mul1", "trellis3_L16_1mad", "trellis4_L13_mul1", "trellis2_L14_hyb"]
NAMES = ["E8P_2", "E8P_3", "E8P_4", *TRELLISES, "trellis3_L11_3inst", "trellis3_L10_hyb"]


def leaves_of(rng, name, *shape):
    """Any bytes are a code."""
    fmt = qjax.format(name)
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] * fmt.code.bits // 8), np.uint8)
    return fmt, {"codes": jnp.asarray(codes), "scale": jnp.asarray(rng.standard_normal((*shape[:-1], 1)), jnp.float16)}


def product(x, fmt, leaves):
    w = np.asarray(fmt.decode(*fmt.unpack(leaves)), np.float64)
    x = np.asarray(x, np.float64)
    return x @ w.T, np.abs(x) @ np.abs(w).T


def assert_rounded_sums(y, x, fmt, leaves):
    """As of any kernel; what is added for all weights alike is at most five times a point; hyb's levels are float16."""
    want, size = product(x, fmt, leaves)
    assert y.shape == want.shape and y.dtype == jnp.float32
    levels = 2.0**-11 if fmt.name.endswith("hyb") else 0
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= (5 * (x.shape[1] + 4) * 2.0**-24 + levels) * size)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_for_bit(name, rng):
    fmt, leaves = leaves_of(rng, name, 2, 16, 80 if name in TRELLISES else 72)
    packed, back = jax.jit(lambda leaves: (packed := prepack(fmt, leaves), unpack(packed)))(leaves)
    assert packed.shape == fmt.shape(leaves) and packed.words.shape == (2, 64, 16 * fmt.code.bits)
    jax.tree.map(np.testing.assert_array_equal, back, leaves)


@pytest.mark.parametrize("name", NAMES)
def test_every_place_has_its_level(name, rng):
    """What the instructions make of the words of two units, one row under another, is what the format decodes."""
    fmt, leaves = leaves_of(rng, name, 64, UNIT * RUN)
    packed, code = prepack(fmt, leaves), decoder(fmt)
    planes = [packed.words[:, k * RUN : (k + 1) * RUN] for k in range(packed.bits)]
    if code.above:
        planes.append(jnp.roll(planes[-1].reshape(4, 16, RUN), 1, axis=1).reshape(64, RUN))
    words = [lax.bitcast_convert_type(p.reshape(64, -1, 2), jnp.uint32) for p in planes]
    ops = Arrays(jnp.asarray(code.table, jnp.uint32))
    found = np.zeros((64, RUN // 2, 2 * UNIT))
    for run, places in enumerate(code.places):
        for decode, factor in code.terms:
            two = np.asarray(lax.bitcast_convert_type(decode(ops, words, run), jnp.float16), np.float64)
            for e, place in enumerate(places):
                found[..., place] += factor * (code.scales[run] if code.scales else 1.0) * two[..., e]
    want = np.asarray(fmt.basis(leaves["codes"])[0])
    got = found.reshape(64, -1) * code.unit + code.center
    np.testing.assert_allclose(got, want, rtol=2.0**-11 if name.endswith("hyb") else 1e-5, atol=1e-6)


def test_all_points_of_e8p_are_decoded():
    fmt = qjax.format("E8P_2")
    every = np.arange(65536, dtype=">u2").view(np.uint8).reshape(512, 256)
    leaves = {"codes": jnp.asarray(every), "scale": jnp.ones((512, 1), jnp.float16)}
    packed = prepack(fmt, leaves)
    word = packed.words.reshape(512, -1, 2, RUN).astype(jnp.uint32)
    ops, code = Arrays(jnp.asarray(decoder(fmt).table, jnp.uint32)), decoder(fmt)
    points = np.asarray(fmt.basis(leaves["codes"])[0]).reshape(512, -1, RUN, 2, 8)
    for run in range(8):  # of one unit in the low half
        made = lax.bitcast_convert_type(code.terms[0][0](ops, [word[:, :, 0], word[:, :, 1]], run), jnp.float16)
        got = np.asarray(made, np.float64) * code.scales[run] * code.unit + code.center
        want = points[..., run // 4, :][..., [run % 4, run % 4 + 4]]
        np.testing.assert_array_equal(got, want)


# (format, rows, columns, batch): ragged rows and columns, all codes, a tile that begins in a row of its own
CASES = [
    ("E8P_2", 70, 264, 1),
    ("E8P_3", 64, 512, 9),
    ("trellis2_L12_3inst", 80, 272, 3),
    ("E8P_4", 1, 72, 2),
    ("trellis2_L16_mul1", 64, 768, 2),
    ("trellis3_L11_1mad", 64, 256, 17),
    ("trellis4_L12_3inst", 16, 512, 2),
    ("trellis2_L14_hyb", 64, 304, 2),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name, rows, columns, batch", CASES, ids=lambda v: str(v))
def test_sums_are_rounded_and_nothing_else(name, rows, columns, batch, rng):
    fmt, leaves = leaves_of(rng, name, rows, columns)
    x, packed = jnp.asarray(rng.standard_normal((batch, columns)) + 0.5, jnp.bfloat16), prepack(fmt, leaves)
    assert_rounded_sums(accumulate(x, packed, interpret=True), x, fmt, leaves)
    assert_rounded_sums(twin(x, packed), x, fmt, leaves)


def test_float32_inputs_lose_nothing_whatever_their_size(rng):
    """Rows far beyond float16's range, in splits."""
    fmt, leaves = leaves_of(rng, "E8P_2", 64, 768)
    x = jnp.asarray(rng.standard_normal((3, 768)) * np.array([[1e-20], [1.0], [1e30]]), jnp.float32)
    x, packed = x.at[1, :4].set(0.0).at[1, 7].set(1e-5), prepack(fmt, leaves)
    y = accumulate(x, packed, Plan(16, 256, 2, 3), interpret=True)
    want, size = product(x, fmt, leaves)
    assert np.all(np.abs(np.asarray(y, np.float64) - want) <= 2.0**-19 * size)  # a part less leaves 2^-17


def test_zero_and_infinite_rows_of_x(rng):
    fmt, leaves = leaves_of(rng, "E8P_2", 64, 256)
    x = jnp.zeros((2, 256), jnp.bfloat16).at[1, 3].set(jnp.inf)
    y = matmul(x, prepack(fmt, leaves), interpret=True)
    assert y.dtype == jnp.bfloat16 and not np.any(np.asarray(y[0])) and not np.any(np.isfinite(np.asarray(y[1])))


@pytest.mark.parametrize(
    "name, most",
    [("E8P_2", 1.5), ("E8P_3", 2.5), ("E8P_4", 3.0), ("trellis2_L12_mul1", 4.5), ("trellis2_L12_3inst", 4.0),
     ("trellis2_L12_hyb", 4.0)],
)  # fmt: skip
def test_instructions_a_weight_are_those_of_the_budget(name, most):
    fmt, ops = qjax.format(name), Counted()
    code = decoder(fmt)
    words = [("w", k) for k in range(fmt.code.bits)] + [("above",)]
    for run in range(len(code.places)):
        for decode, _ in code.terms:
            decode(ops, words, run)
    assert most - 0.1 < len(ops.made) / (2 * UNIT) <= most


# Registers of a thread, and SASS instructions for a weight in the main loop, at batch 8, 8192 x 8192.
CEILINGS = {
    "E8P_2": (100, 2.05),
    "E8P_3": (124, 3.5),
    "E8P_4": (126, 4.0),
    "trellis2_L12_mul1": (100, 5.2),
    "trellis2_L16_1mad": (168, 5.2),
    "trellis2_L12_3inst": (168, 5.0),
    "trellis3_L12_3inst": (168, 5.65),
    "trellis2_L12_hyb": (126, 4.7),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CEILINGS)
def test_compiled_for_an_h100(name, h100):
    """Without spills, under the ceilings, and no temporaries but x in runs and the sums of splits."""
    fmt, n = qjax.format(name), 8192
    words = jax.ShapeDtypeStruct((n, n * fmt.code.bits // 16), jnp.uint16)
    plan = plan_for(8, Points(words, None, fmt, n, n), decoder(fmt).wide)
    made = h100(
        lambda x, words, scale: accumulate(x, Points(words, scale, fmt, n, n)),
        jax.ShapeDtypeStruct((8, n), jnp.bfloat16), words, jax.ShapeDtypeStruct((n, 1), jnp.float16),
    )  # fmt: skip
    assert made.temporary <= 4 * 8 * plan.split * n + 2 * 8 * n * (decoder(fmt).wide + 1) + 4096
    registers, instructions = CEILINGS[name]
    assert not made.spilled and made.registers <= registers
    assert made.main_loop * 128 / (64 * plan.columns) <= instructions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["E8P_4", "trellis2_L12_3inst", "trellis2_L12_mul1"])
def test_a_full_batch_compiles(name, h100):
    fmt, n = qjax.format(name), 2048
    words = jax.ShapeDtypeStruct((n, n * fmt.code.bits // 16), jnp.uint16)
    made = h100(
        lambda x, words, scale: accumulate(x, Points(words, scale, fmt, n, n)),
        jax.ShapeDtypeStruct((64, n), jnp.bfloat16), words, jax.ShapeDtypeStruct((n, 1), jnp.float16),
    )  # fmt: skip
    assert not made.spilled


def test_what_has_no_kernel_says_why(rng):
    bf16 = jnp.bfloat16
    assert (
        unfit(qjax.format("E8P_3"), (64, 512), 64, bf16)
        == unfit(trellis(1, 8, "mul1"), (64, 64), 21, jnp.float32)
        == ""
    )
    assert unfit(qjax.format("E8P_3"), (64, 512), 65, bf16) == "65 rows of bfloat16, not 1 to 64"
    assert "no vectors under a scale of each row" in unfit(qjax.format("IQ2_XXS"), (64, 512), 1, bf16)
    fmt, leaves = leaves_of(rng, "E8P_2", 64, 256)
    packed = prepack(fmt, leaves)
    with pytest.raises(UserError, match=r"takes x \[m, 256\], got \[2, 512\]"):
        matmul(jnp.ones((2, 512)), packed)
    with pytest.raises(UserError, match="columns times split a divisor of 256"):
        matmul(jnp.ones((2, 256)), packed, Plan(8, 512, 2, 1))
    with pytest.raises(UserError, match="one matrix, got a stack of E8P_2"):
        matmul(jnp.ones((2, 256)), jax.tree.map(lambda a: a[None], packed))
    with pytest.raises(UserError, match="Q4_0 has no layout of points"):
        prepack(qjax.format("Q4_0"), {})


@pytest.mark.parametrize("name", ["E8P_2", "trellis2_L12_3inst"])
def test_what_the_table_says(name):
    """Prepacked weights on a Hopper: the kernel; all else that decodes a table takes a few rows at a time."""
    call = Call(qjax.format(name), (64, 256), 1, jnp.dtype(jnp.bfloat16))
    assert choice(call, "cuda")[0].name == "mosaic_gpu_vectors"
    assert choice(Call(call.format, call.shape, 100, call.dtype), "cuda")[0].name == "strips"
    assert choice(call, "tpu")[0].name == choice(call, "cpu")[0].name == "strips"
    assert choice(Call(qjax.format("IQ2_S"), (64, 256), 1), "cuda")[0].name == "strips"
    assert choice(Call(qjax.format("FP8_E4M3_tensor"), (64, 256), 1), "cuda")[0].name == "whole"
