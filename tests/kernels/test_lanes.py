"""Weights whose outputs lie side by side: drawn as they say, bit for bit there and back, products against float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import products
import pytest

import qjax
from qjax.errors import UserError
from qjax.formats import format, format_names
from qjax.formats.levels import Integers
from qjax.kernels import lanes
from qjax.kernels.layouts import fits
from qjax.kernels.layouts.coding import unfit
from qjax.kernels.layouts.lanes import prepack, unpack
from qjax.reparam.inputs import RoundedInput

READ = [n for n in format_names() if not unfit(format(n)) and isinstance(format(n).levels, Integers)]
MADE = ["uint8_g128", "uint4_g16", "int3_g64_mid_mse", "uint5_g32", "int6_g64_bf16", "int4_row", "uint4_g64_m"]


def test_bytes_are_as_drawn():
    """Four bits: input 5 of a run of 32 in the low half of row 5, input 21 in its high half; scales of rows."""
    q = qjax.quantize(jax.random.normal(jax.random.key(0), (3, 64)), "Q4_0")
    packed = prepack(q.format, q.leaves)
    (plane,), codes = packed.planes, np.asarray(q.format.unpack(q.leaves)[1]) + 8
    assert plane.shape == (32, 3) and packed.scales["d"].shape == (2, 3) and packed.scales["d"].dtype == jnp.float16
    for row, run, j in ((5, 0, 5), (16 + 7, 1, 7)):
        np.testing.assert_array_equal(plane[row] & 15, codes[:, 32 * run + j])
        np.testing.assert_array_equal(plane[row] >> 4, codes[:, 32 * run + 16 + j])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", READ + MADE)
def test_prepack_and_back_is_bit_for_bit(name, rng):
    fmt = format(name)
    n = 8 * (fmt.block or 8)  # streams of scales without padding, whose bits would be random, too
    leaves = jax.eval_shape(lambda w: qjax.quantize(w, fmt), jax.ShapeDtypeStruct((2, 5, n), jnp.float32)).leaves
    leaves = jax.tree.map(partial(_random, rng), leaves)
    if name == "TQ1_0":  # trits do not make every byte
        leaves = qjax.quantize(rng.standard_normal((2, 5, n)).astype(np.float32), fmt).leaves
    packed, back = jax.jit(lambda leaves: (packed := prepack(fmt, leaves), unpack(packed)))(leaves)
    assert packed.shape == (2, 5, n) and back.keys() == leaves.keys()
    for key, leaf in leaves.items():
        assert back[key].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(back[key]).view(np.uint8), np.asarray(leaf).view(np.uint8))


def test_bytes_that_a_kernel_reads():
    """Those of the file, but a whole byte for an integer scale, and two bits for a trit."""

    def bits(name):
        fmt = format(name)
        return jax.eval_shape(partial(prepack, fmt), fits._leaves(fmt, (4, 1024))).bits_per_weight

    made = {"Q2_K": 3.125, "Q3_K": 3.5625, "Q4_K": 4.625, "Q5_K": 5.625, "TQ1_0": 2.0625, "uint4_g64": 4.375}
    same = {name: format(name).bits_per_weight for name in ("Q4_0", "Q8_0", "Q6_K", "int4_g128", "uint4_g64_m")}
    assert {name: bits(name) for name in made | same} == made | same


def _random(rng, leaf):
    """Any codes; scales that are numbers."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return jnp.asarray(rng.integers(0, 256, leaf.shape, np.uint8) & 0xBF)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "uint3_g64", "int8_row", "Q8_0", "int3_g64_mid_mse", "uint4_g64_m"])
def test_sums_are_rounded_and_nothing_else(name, rows, rng, monkeypatch):
    """Of three strips of outputs, the last begun early, and of several of inputs."""
    fmt, leaves = products.weights(rng, name, 40, 768)
    monkeypatch.setattr(lanes, "STRIP", 16 * max(256 if fmt.block == 256 else 64, 32))
    x = products.exact(rng, rows, 768)
    y = jax.jit(lambda x, leaves: lanes.matmul(x, prepack(fmt, leaves), fmt))(x, leaves)
    products.assert_rounded_sums(y, x, fmt, leaves)


def test_dot_of_prepacked_weights_decodes_a_strip():
    """Of any layer of the model that asks: a stack of experts too, and a gradient by x."""
    q = qjax.quantize(jax.random.normal(jax.random.key(0), (1024, 1024)), "Q4_0")
    ready = qjax.prepack(q, dtype=jnp.float32)
    assert ready.format.layout.name == "lanes" and ready.nbytes == q.nbytes
    x = jax.ShapeDtypeStruct((1, 1024), jnp.float32)
    used = jax.jit(qjax.dot).lower(x, ready).compile().memory_analysis()
    assert used.temp_size_in_bytes < 2 * 4 * lanes.STRIP  # W is four of them
    bf16 = qjax.dot(jnp.ones((2, 1024), jnp.bfloat16), ready)
    np.testing.assert_allclose(
        bf16.astype(jnp.float32), qjax.dequantize(q).sum(1)[None].repeat(2, 0), rtol=1e-2, atol=0.1
    )


def test_experts_and_gradients(rng):
    q = qjax.quantize(jnp.asarray(rng.standard_normal((3, 8, 64)), jnp.float32), "Q8_0")
    x = jnp.asarray(rng.standard_normal((3, 2, 64)), jnp.float32)
    ready = qjax.prepack(q, dtype=jnp.float32)
    y, back = jax.vjp(lambda x: jax.vmap(qjax.dot)(x, ready), x)
    w = np.asarray(qjax.dequantize(q), np.float64)
    np.testing.assert_allclose(y, np.einsum("ebn,eon->ebo", x, w), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(back(jnp.ones_like(y))[0][:, 0], w.sum(1), rtol=1e-4, atol=1e-4)


def test_what_has_no_such_layout_says_why():
    w = jax.random.normal(jax.random.key(0), (2, 64))
    for name, why in (("NF4", "levels are a table"), ("FP8_E4M3", "neither integers nor a table")):
        q = qjax.quantize(w, name)
        with pytest.raises(UserError, match=why):
            prepack(q.format, q.leaves)
    odd = qjax.quantize(w[:, :20], "int8_row")
    with pytest.raises(UserError, match="rows are no multiple of 8 weights"):
        prepack(odd.format, odd.leaves)


def test_weights_that_round_their_inputs_stay_as_they_are():
    """Integers meet integers there: no kernel takes part."""
    q = qjax.quantize(jax.random.normal(jax.random.key(0), (4, 64)), "int8_row")
    q = dataclasses.replace(q, applied=(RoundedInput(None),))
    assert qjax.prepack(q) is q
