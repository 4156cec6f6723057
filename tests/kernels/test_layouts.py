"""Layouts of kernels: bit for bit there and back, and drawn as they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.formats import format, format_names
from qjax.kernels import mosaic_gpu, mosaic_tpu
from qjax.kernels.layouts import columns
from qjax.kernels.layouts.coding import coding, unfit
from qjax.kernels.layouts.planar import prepack, unpack
from qjax.kernels.layouts.planes import pack_plane, unpack_plane

READ = [name for name in format_names() if not unfit(format(name))]
MADE = ["uint8_g128", "uint4_g16", "int3_g64_mid_mse", "uint5_g32", "int6_g64_bf16", "NF4_b32", "int4_row"]


def test_which_formats_have_a_coding():
    without = set(format_names()) - set(READ)
    vectors = {"IQ1", "IQ2", "IQ3", "E8P", "trellis2", "trellis3", "trellis4", "lut2", "lut3", "lut4", "aqlm"}
    assert {n.split("_")[0] for n in without} <= {"F32", "F16", "BF16", "FP8", "NF4", "FP4", "uint3", "Q1"} | vectors
    assert {n for n in without if n.startswith(("NF4", "FP4", "uint3"))} == {
        *("NF4_dq", "FP4_dq", "uint3_g16_bilevel3x16"),
    }
    assert {"Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "int4_g128", "NF4"} <= set(READ)
    with pytest.raises(UserError, match="NF4_dq has no kernel: its scales"):
        coding(format("NF4_dq"))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", READ + MADE)
def test_prepack_and_back_is_bit_for_bit(name, rng):
    fmt = format(name)
    n = 8 * (fmt.block or 20)
    w = jax.ShapeDtypeStruct((2, 5, n), jnp.float32)
    leaves = jax.tree.map(partial(_random, rng), jax.eval_shape(lambda w: qjax.quantize(w, fmt), w).leaves)
    if name in ("TQ1_0", "NVFP4"):  # trits and unsigned scales do not make every byte
        leaves = qjax.quantize(rng.standard_normal(w.shape).astype(np.float32), fmt).leaves
    packed, back = jax.jit(lambda leaves: (packed := prepack(fmt, leaves), unpack(packed)))(leaves)
    assert packed.rows == 5 and packed.columns == n and all(p.shape[:2] == (2, 64) for p in packed.planes)
    assert back.keys() == leaves.keys()
    for key, leaf in leaves.items():
        assert back[key].dtype == leaf.dtype
        np.testing.assert_array_equal(_bits(back[key]), _bits(leaf), err_msg=key)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [n for n in READ + MADE if not n.startswith(("NF4", "FP4", "MXFP4", "NVFP4"))])
def test_columns_and_back_are_bit_for_bit(name, rng):
    fmt = format(name)
    n = 8 * (fmt.block or 20)
    w = jax.ShapeDtypeStruct((2, 5, n), jnp.float32)
    leaves = jax.tree.map(partial(_random, rng), jax.eval_shape(lambda w: qjax.quantize(w, fmt), w).leaves)
    if name == "TQ1_0":
        leaves = qjax.quantize(rng.standard_normal(w.shape).astype(np.float32), fmt).leaves
    packed, back = jax.jit(lambda leaves: (packed := columns.prepack(fmt, leaves), columns.unpack(packed)))(leaves)
    assert packed.codes.shape[:1] + packed.codes.shape[2:] == (2, 128) and packed.columns == n
    assert packed.bits <= max(4, 8 * (coding(fmt).bits > 4 or name.startswith("IQ4")))
    for key, leaf in leaves.items():
        np.testing.assert_array_equal(_bits(back[key]), _bits(leaf), err_msg=key)


def _random(rng, leaf):
    """Any codes; scales that are numbers: no exponent of all ones, as bytes of fp16 and of FP8 have it."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8) & 0xBF)


def _bits(x):
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "TQ2_0", "IQ4_NL", "MXFP4", "uint8_g128", "int3_g64_mid_mse"])
def test_levels_are_the_formats(name):
    fmt = format(name)
    code = coding(fmt)
    u = jnp.arange(2**code.bits, dtype=jnp.uint8)
    q = code.codes(u)
    np.testing.assert_array_equal(code.stored(q), u)
    np.testing.assert_array_equal(code.values(u) + code.center, fmt.levels.value(q))


def test_planes_are_as_drawn():
    codes = np.random.default_rng(0).integers(0, 16, 256, np.uint8)
    words = np.asarray(pack_plane(jnp.asarray(codes), 4, 32))
    assert words.dtype == np.uint16 and words.shape == (64,)
    for word, i in ((0, 0), (31, 3), (33, 2)):
        block, j = divmod(word, 32)
        assert words[word] >> (4 * i) & 15 == codes[128 * block + 32 * i + j]
    for bits in (1, 2, 8):
        codes = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (3, 512), np.uint8))
        np.testing.assert_array_equal(unpack_plane(pack_plane(codes, bits, 32), bits, 32), codes)


def test_stacks_are_packed_as_one_program():
    w = jax.random.normal(jax.random.key(0), (3, 4, 256))
    q = qjax.quantize(w, "Q4_K")
    mapped = jax.vmap(lambda leaves: prepack(q.format, leaves))(q.leaves)
    whole = jax.jit(lambda leaves: prepack(q.format, leaves))(q.leaves)
    jax.tree.map(np.testing.assert_array_equal, mapped, whole)
    assert (
        whole.shape == q.shape
        and whole.padded == (64, 256)
        and jax.eval_shape(unpack, whole)["blocks"].shape == q.leaves["blocks"].shape
    )


def test_bytes_that_a_kernel_reads():
    def bits(name):
        leaves = jax.eval_shape(lambda w: qjax.quantize(w, name), jax.ShapeDtypeStruct((64, 1024), jnp.float32)).leaves
        return jax.eval_shape(lambda leaves: prepack(format(name), leaves), leaves).bits_per_weight

    assert {n: bits(n) for n in ("Q4_0", "Q8_0", "int4_g128", "Q6_K", "IQ4_NL")} == {
        n: format(n).bits_per_weight for n in ("Q4_0", "Q8_0", "int4_g128", "Q6_K", "IQ4_NL")
    }
    assert bits("Q4_K") == 4.625 and bits("Q3_K") == 3.5625 and bits("Q2_K") == 3.125


def test_a_table_may_ask_before_there_are_weights():
    bf16, f32 = jnp.bfloat16, jnp.float32
    assert mosaic_gpu.unfit(format("Q4_K"), (64, 512), 8, bf16) == ""
    assert mosaic_gpu.unfit(format("Q4_K"), (64, 512), 65, bf16) == "65 rows of bfloat16, not 1 to 64"
    assert mosaic_gpu.unfit(format("Q4_K"), (64, 512), 22, f32) == "22 rows of float32, not 1 to 21"
    assert mosaic_gpu.unfit(format("Q4_K"), (64, 512), 8, jnp.int8) == "x is int8, not bfloat16, float16 or float32"
    assert "stored in a way" in mosaic_gpu.unfit(format("NF4_dq"), (64, 512), 8, bf16)
    assert mosaic_tpu.unfit(format("Q4_K"), (64, 512), 800, bf16) == mosaic_gpu.unfit(format("NF4"), (64, 512), 8, bf16)
    assert "no sixteen integers" in mosaic_tpu.unfit(format("NF4"), (64, 512), 8, bf16)
    assert "power of two" in mosaic_tpu.unfit(format("int4_g8"), (64, 512), 8, bf16)
    assert not mosaic_gpu.no_hopper("NVIDIA H100 80GB HBM3") and mosaic_gpu.no_hopper("NVIDIA RTX 6000 Ada")


@pytest.mark.parametrize(
    "name, shape, says",
    [
        ("Q4_0", (64,), "takes a matrix"),
        ("int4_g8", (4, 64), "power of two from 16 on"),
        ("int4_g96", (4, 192), "power of two from 16 on, or rows, got 96"),
        ("NF4_dq", (4, 64), "stored in a way that no kernel reads"),
        ("F16", (4, 64), "F16 has no kernel"),
    ],
)
def test_what_has_no_layout_says_why(name, shape, says):
    fmt = format(name)
    with pytest.raises(UserError, match=says):
        prepack(fmt, qjax.quantize(jnp.ones(shape), fmt).leaves)
