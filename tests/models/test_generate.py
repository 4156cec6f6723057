"""Generation: the same tokens as the plain forward pass gives, sampling that keeps its promises, clear errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny

import qjax
from qjax.errors import UserError
from qjax.models import generate as generation
from qjax.models import parts
from qjax.models.generate import Sampling, generate, sample
from qjax.models.model import Model, dense_params, forward

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model():
    return Model(*tiny("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-window"])
def test_greedy_tokens_are_the_argmax_of_the_uncached_forward_pass(name):
    model = Model(*tiny(name))
    made = list(generate(model, PROMPT, 20))
    assert len(made) == 20
    logits = np.asarray(model.logits(jnp.array([PROMPT + made[:-1]])))[0, len(PROMPT) - 1 :]
    chosen = logits[np.arange(20), made]
    np.testing.assert_allclose(chosen, logits.max(axis=-1), atol=1e-4)
    assert len(set(made)) > 2


def test_one_compilation_serves_every_layer_and_position_and_nearby_lengths(model):
    generation._block.clear_cache()
    list(generate(model, PROMPT, 20))
    list(generate(model, PROMPT[:3], 30))
    assert generation._block._cache_size() == 2  # the prompt, and one token


def test_a_prompt_longer_than_the_padding_and_a_full_context():
    config, params = tiny("llama")
    model = Model(dataclasses.replace(config, context=100), params)
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, config.vocab, 90)]
    made = list(generate(model, prompt, 10))
    logits = np.asarray(model.logits(jnp.array([prompt + made[:-1]])))[0, 89:]
    np.testing.assert_allclose(logits[np.arange(10), made], logits.max(axis=-1), atol=1e-4)


def test_stops_before_eos_and_yields_one_at_a_time(model):
    everything = list(generate(model, PROMPT, 20))
    stop = everything[7]
    assert list(generate(model, PROMPT, 20, stop=[stop])) == everything[: everything.index(stop)]
    first = generate(model, PROMPT, 20)
    assert next(first) == everything[0]


def test_sampling_is_reproducible_and_follows_its_key(model):
    hot = Sampling(temperature=1.5)
    a, b, c = (list(generate(model, PROMPT, 20, hot, jax.random.key(k))) for k in (0, 0, 1))
    assert a == b != c


def test_sampled_frequencies_are_the_softmax():
    logits = jnp.array([[1.0, 0.0, -1.0, 2.0]])
    many = jnp.broadcast_to(logits, (4000, 4))
    drawn = np.asarray(sample(many, Sampling(temperature=0.7), jax.random.key(0)))
    expected = np.exp(np.asarray(logits[0]) / 0.7)
    expected /= expected.sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, expected, atol=0.03)


@pytest.mark.parametrize(
    "sampling, allowed",
    [
        (Sampling(1.0, top_k=2), {3, 0}),
        (Sampling(1.0, top_p=0.5), {3}),  # p = .64 .24 .09 .03: the first alone reaches one half
        (Sampling(1.0, top_p=0.7), {3, 0}),
        (Sampling(1.0, top_k=3, top_p=0.99), {3, 0, 1}),
        (Sampling(1.0, top_k=99, top_p=1.0), {0, 1, 2, 3}),
        (Sampling(0.0, top_k=3), {3}),
    ],
)
def test_top_k_and_top_p_keep_exactly_their_sets(sampling, allowed):
    many = jnp.broadcast_to(jnp.array([[1.0, 0.0, -1.0, 2.0]]), (2000, 4))
    drawn = sample(many, sampling, jax.random.key(0))
    assert set(np.asarray(drawn).tolist()) == allowed


@pytest.mark.parametrize(
    "prompt, count, sampling, message",
    [
        ([], 5, Sampling(), "the prompt is empty"),
        ([1, 2], 63, Sampling(), "2 tokens and 63 new ones exceed the model's context of 64; ask for at most 62"),
        ([1] * 64, 1, Sampling(), "shorten the prompt"),
        ([1, 101], 5, Sampling(), "token 101 is outside the model's vocabulary of 101"),
        ([-1], 5, Sampling(), "token -1"),
        ([1], 0, Sampling(), "max_tokens is 0"),
        ([1], 5, Sampling(1.0), "needs a key"),
    ],
)
def test_mistakes_are_reported_by_the_call(model, prompt, count, sampling, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompt, count, sampling)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_packed_weights_are_decoded_first():
    """A model with QTensor leaves computes what its decoded weights compute."""
    config, params = tiny("llama")
    packed = jax.tree.map(lambda w: w, params)
    kernel = packed["layers_0"]["attn"]["o"]["kernel"]  # (64, 48): blocks run along the input axis
    packed["layers_0"]["attn"]["o"]["kernel"] = qjax.quantize(kernel, "Q8_0", axis=0)
    dense = dense_params(packed)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, params)
    moved = jnp.abs(dense["layers_0"]["attn"]["o"]["kernel"] - kernel).max()
    assert 0 < moved < 0.02
    tokens = jnp.array([PROMPT])
    np.testing.assert_array_equal(Model(config, packed).logits(tokens), forward(config, dense, tokens))
    assert list(generate(Model(config, packed), PROMPT, 5)) == list(generate(Model(config, dense), PROMPT, 5))


@pytest.mark.parametrize("held", [0, 160_000])
def test_a_model_too_large_to_be_held_makes_the_same_tokens(model, held, monkeypatch):
    """Parts that do not fit are asked for at each step; the head of a file, some rows at a time."""
    asked = []

    class File:
        config, tokenizer = model.config, None

        def part(self, name):
            asked.append(name)
            return model.part(name)

        def table(self, name):
            return model.table(name)

    monkeypatch.setattr(parts, "HEAD_WEIGHTS", 30 * model.config.dim)
    assert list(generate(File(), PROMPT, 6, held_bytes=held)) == list(generate(model, PROMPT, 6))
    again = [asked.count(f"layers_{i}") for i in range(model.config.layers)]
    assert ("head" in asked) == (held > 0) and again == ([6, 6] if held == 0 else [1, 6])


def test_logits_check_their_tokens(model):
    with pytest.raises(UserError, match="65 tokens are more than the model's context of 64"):
        model.logits(np.zeros((1, 65), np.int32))
    with pytest.raises(UserError, match="outside"):
        model.logits(np.full((1, 3), 500))
    with pytest.raises(UserError, match="integers"):
        model.logits(np.zeros((1, 3)))
