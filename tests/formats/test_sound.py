"""Weights that are no numbers, or too large, never decode to something that looks sound; nor do tiny ones get worse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.training.grid.fake_quant import fake_quant
from qjax.training.grid.quantizer import Quantizer

N = 256
# One of each way that scales are found and stored.
FORMATS = ("Q2_K", "Q6_K", "IQ4_NL", "NVFP4", "MXFP4", "Q4_0", "int4_g128", "uint3_g16_bilevel3x16", "NF4_dq")


@pytest.fixture(scope="module")
def w():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, N)), jnp.float32)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_is_seen_under_jit(name, w):
    """The whole block is NaN, in the values and in the stored bytes; blocks without such a weight are as they were."""
    block = qjax.format(name).block if name != "NVFP4" else 16
    coded = jax.jit(lambda w: qjax.quantize(w, name))
    sound = np.asarray(qjax.dequantize(coded(w)))
    assert np.isfinite(sound).all()
    for bad in (np.nan, np.inf, -np.inf):
        w_hat = np.asarray(qjax.dequantize(coded(w.at[1, 7].set(bad))))
        assert np.isnan(w_hat[1, :block]).all()
        if name != "NF4_dq":  # where all blocks of a matrix share an offset
            np.testing.assert_array_equal(w_hat[0], sound[0])
            np.testing.assert_array_equal(w_hat[1, block:], sound[1, block:])


@pytest.mark.parametrize("scales", ["refit", "frozen", "learned"])
def test_training_forward_shows_divergence(scales, w):
    """Fitted or kept, no scale makes a number of NaN, and what is exported says it too."""
    q = Quantizer(qjax.format("NVFP4"), scales=scales)
    trained, kept = q.init(w)
    broken = w.at[0, 3].set(jnp.nan)
    for value in (jax.jit(q.fake)(broken, trained, kept), qjax.dequantize(q.pack(broken, trained, kept))):
        assert np.isnan(np.asarray(value)[0, :16]).all() and np.isfinite(np.asarray(value)[1]).all()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["Q6_K", "Q2_K", "IQ4_NL", "Q4_0", "Q4_1", "int4_g128_mse", "uint3_g16_bilevel3x16"])
def test_weights_beyond_the_scales_are_refused(name, weighted, w):
    """Eager: an error that names the format. Under jit: not finite, in the training forward too."""
    importance = jnp.ones(N) if weighted else None
    with pytest.raises(UserError, match=f"too large for the scales of {name}"):
        qjax.quantize(1e12 * w, name, weight=importance)
    assert not np.isfinite(fake_quant(1e12 * w, name, weight=importance)).any()


def test_float32_scales_take_what_float16_ones_refuse(w):
    w_hat = qjax.dequantize(qjax.quantize(1e12 * w, "int4_g128_f32"))
    assert float(jnp.linalg.norm(w_hat / 1e12 - w) / jnp.linalg.norm(w)) < 0.15


@pytest.mark.sampled(1)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_tiny_blocks_are_no_worse_than_zeros(name, weighted, w):
    """No level of theirs is zero, and the least fp16 scale is 6e-8."""
    tiny = 1e-8 * w
    w_hat = qjax.dequantize(qjax.quantize(tiny, name, weight=jnp.ones(N) if weighted else None))
    assert float(jnp.linalg.norm(w_hat - tiny) / jnp.linalg.norm(tiny)) <= 1


@pytest.mark.parametrize("quantized", [qjax.quantize, fake_quant])
@pytest.mark.parametrize("shape", [(0, N), (2, 0, N)])
def test_an_array_without_weights_is_refused(quantized, shape):
    with pytest.raises(UserError, match="no weights"):
        quantized(jnp.zeros(shape), "Q4_K")


def test_importance_may_be_a_constant_of_a_jitted_function(w):
    h = jnp.arange(N, dtype=jnp.float32)
    inside = jax.jit(lambda w: qjax.quantize(w, "Q4_0", weight=h))(w)
    np.testing.assert_array_equal(inside.leaves["blocks"], qjax.quantize(w, "Q4_0", weight=h).leaves["blocks"])
