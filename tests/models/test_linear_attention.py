"""The gated delta rule in chunks against its recurrence, and what it keeps of a text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny

from qjax.models.cache import empty_cache
from qjax.models.config import LinearAttention
from qjax.models.decoder import Decoder
from qjax.models.generate import generate
from qjax.models.linear_attention import CHUNK, causal_conv, gated_delta_rule, normalized, shared
from qjax.models.model import Model, forward


def recurrence(q, k, v, log_a, write, state):
    """S = a S + b k (v - (a S)^T k)^T, o = S^T q, step by step in float64."""
    made, S = np.zeros(v.shape), np.asarray(state, np.float64)
    for t in range(q.shape[1]):
        S = np.exp(log_a[:, t])[..., None, None] * S
        wrong = v[:, t] - np.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + np.einsum("bh,bhk,bhv->bhkv", write[:, t], k[:, t], wrong)
        made[:, t] = np.einsum("bhkv,bhk->bhv", S, q[:, t])
    return made, S


def problem(rng, t, b=2, h=3, n=8, d=5):
    k = rng.standard_normal((b, t, h, n))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q, v = rng.standard_normal((b, t, h, n)), rng.standard_normal((b, t, h, d))
    log_a, write = -rng.exponential(0.3, (b, t, h)), rng.uniform(0.2, 1, (b, t, h))
    return q, k, v, log_a, write, rng.standard_normal((b, h, n, d))


@pytest.mark.parametrize("t", [1, 5, CHUNK, 2 * CHUNK + 7])
def test_chunks_are_the_recurrence(rng, t):
    parts = problem(rng, t)
    o, state = jax.jit(gated_delta_rule)(*(jnp.asarray(x, jnp.float32) for x in parts))
    for got, wanted in zip((o, state), recurrence(*parts), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_nothing_is_forgotten_or_overflows_at_the_ends(rng):
    """Memory that decays to nothing within a chunk, and memory that does not decay."""
    q, k, v, _, write, state = problem(rng, 2 * CHUNK)
    for log_a in (np.full(write.shape, -50.0), np.zeros(write.shape)):
        parts = q, k, v, log_a, write, state
        o, last = gated_delta_rule(*(jnp.asarray(x, jnp.float32) for x in parts))
        wanted = recurrence(*parts)
        np.testing.assert_allclose(o, wanted[0], atol=1e-4 * np.abs(wanted[0]).max())
        np.testing.assert_allclose(last, wanted[1], atol=1e-4 * np.abs(wanted[1]).max())


def test_a_key_that_is_written_is_what_is_read(rng):
    """The delta rule: with b = 1 and no decay a key's value is replaced, not added to."""
    key = jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32)
    key = normalized(jnp.tile(key, (1, 3, 1, 1)))
    v = jnp.asarray(rng.standard_normal((1, 3, 1, 5)), jnp.float32)
    o, _ = gated_delta_rule(key, key, v, jnp.zeros((1, 3, 1)), jnp.ones((1, 3, 1)), jnp.zeros((1, 1, 8, 5)))
    np.testing.assert_allclose(o, v, atol=1e-5)


def test_a_convolution_sees_its_width(rng):
    x, kernel = rng.standard_normal((2, 9, 4)), rng.standard_normal((4, 3))
    got = causal_conv(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    wanted = np.stack([[np.convolve(x[b, :, c], kernel[c, ::-1], "valid") for c in range(4)] for b in range(2)])
    np.testing.assert_allclose(got, wanted.swapaxes(1, 2), atol=1e-5)


def test_value_heads_share_key_heads_in_either_order():
    rule = LinearAttention((0,), key_heads=2, value_heads=6, key_dim=1, value_dim=1)
    x = jnp.arange(2.0).reshape(1, 1, 2, 1)
    assert shared(x, rule).ravel().tolist() == [0, 0, 0, 1, 1, 1]
    assert shared(x, dataclasses.replace(rule, tiled=True)).ravel().tolist() == [0, 1, 0, 1, 0, 1]


def test_padding_leaves_no_trace_in_memory():
    """A prompt that generation pads gives the tokens of the plain forward pass, and one step keeps what many do."""
    config, params = tiny("qwen3_5")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    made = list(generate(Model(config, params), prompt, 12))
    logits = np.asarray(forward(config, params, jnp.array([prompt + made[:-1]])))[0, len(prompt) - 1 :]
    np.testing.assert_allclose(logits[np.arange(12), made], logits.max(axis=-1), atol=1e-4)
    tokens = jnp.array([prompt])
    step = jax.jit(lambda t, c: Decoder(config).apply({"params": params}, t, c)[1])
    whole, cache = step(tokens, empty_cache(config, 1, 8)), empty_cache(config, 1, 8)
    for i in range(8):
        cache = step(tokens[:, i : i + 1], cache)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, cache)
    shapes = jax.tree.map(jnp.shape, empty_cache(config, 1, 8)["layers_0"])
    assert shapes == {"conv": (1, 3, 64), "state": (1, 4, 8, 8)}  # whatever the capacity
