"""The decoder against transformers, against itself with a cache, and its parts against their formulas."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import LENGTH, TINY, tiny, tiny_tokens

from qjax.io.huggingface import in_folder
from qjax.models.attention import attend_causally
from qjax.models.cache import empty_cache
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.decoder import Decoder
from qjax.models.families import config_from_hf, config_to_hf, weight_names
from qjax.models.model import forward
from qjax.models.rotary import rope_frequencies, rotate

# Six layers are slow to compile; longrope turns otherwise from some length on, so that what is cached no longer fits.
SMALL = [name for name in TINY if name not in ("gemma3-pattern", "phi3-longrope")]


def transformers_logits(hf, config, params, tokens):
    """What transformers computes from the same config.json and weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    hf = {"pad_token_id": None} | copy.deepcopy(
        hf
    )  # it edits nested dicts in place; default ids exceed a tiny vocabulary
    settings = transformers.AutoConfig.for_model(**hf)
    state = {}
    for weight in weight_names(config):
        value = params
        for part in weight.path:
            value = value[part]
        parts = np.asarray(weight.turned(value)).reshape(-1, *weight.hf_shape)
        state |= dict(zip(weight.hf_names, parts, strict=True))
    infos, arrays = in_folder(config, [(name, "F32", a.shape) for name, a in state.items()], state.values())
    state = {name: a for (name, *_), a in zip(infos, arrays, strict=True)}
    state = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in state.items()}
    model, loaded = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)].from_pretrained(
        None, config=settings, state_dict=state, attn_implementation="eager", output_loading_info=True
    )
    model = model.float().eval()
    assert not any(loaded[kind] for kind in loaded if kind != "missing_keys"), loaded
    assert set(loaded["missing_keys"]) <= ({"lm_head.weight"} if config.tied else set())
    model.tie_weights()
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens)).long()).logits.numpy(), settings.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_logits_equal_transformers(name):
    config, params = tiny(name)
    tokens = tiny_tokens(config)
    ours = forward(config, params, tokens)
    theirs, settings = transformers_logits(TINY[name], config, params, tokens)
    assert np.abs(theirs).max() > 0.5  # the comparison below is not between zeros
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4, rtol=1e-4)
    assert config_from_hf(settings) == config  # transformers' own spelling of the same config

    again, _ = transformers_logits(config_to_hf(config), config, params, tokens)
    np.testing.assert_array_equal(again, theirs)  # what we write, transformers reads as the same model


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_options_change_the_logits(name):
    """Every option of the tiny configs acts at the tested positions: without it the logits move."""
    config, params = tiny(name)
    tokens = tiny_tokens(config)
    plain = {
        "rope_scaling": None,
        "window": None,
        "global_layers": (),
        "local_rope_theta": None,
        "query_dim": None,
        "attn_softcap": None,
        "logit_softcap": None,
        "embed_scale": False,
        "norm_offset": 0.0,
        "activation": "silu",
        "nope_layers": (),
        "rotary_dim": None,
        "rope_pairs": False,
        "embed_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attn_multiplier": None,
        "logit_divisor": 1.0,
        "expert_norm": config.expert_norm ^ (config.experts > 0),
        "experts_used": min(1, config.experts_used),
        "shared_gate": False,
        "router": "softmax",
        "expert_scale": 1.0,
        "expert_groups": 0,
        "expert_group_best": 1 if config.expert_groups else config.expert_group_best,
        "v_norm": False,
        "out_scale": False,
    }
    logits = forward(config, params, tokens)
    for field, value in plain.items():
        tables = (
            config.rope_scaling is not None and config.rope_scaling.kind == "longrope"
        )  # as long as rotary_dim says
        shaped = {"rotary_dim"} if tables or config.kv_rank else set()
        shaped |= {"expert_norm"} if config.experts_beside else set()  # a norm behind takes nearly all of it
        shaped |= {"window", "global_layers"} if config.global_head_dim else set()
        if getattr(config, field) != value and field not in shaped:
            other = dataclasses.replace(config, **{field: value})
            moved = jnp.abs(forward(other, params, tokens) - logits).max()
            assert moved > 1e-3, field


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_cached_equals_uncached(name):
    """A prompt, then single tokens, then a few at once, through the cache."""
    config, params = tiny(name)
    tokens = tiny_tokens(config)
    full = forward(config, params, tokens)
    step = jax.jit(lambda t, c: Decoder(config).apply({"params": params}, t, c))
    cache, parts, done = empty_cache(config, 2, LENGTH + 3), [], 0
    sizes = [9, 1, 5, 1, 1, 1, 5, 1] if name in ("llama", "gemma3") else [9] + 15 * [1]
    for size in sizes:
        logits, cache = step(tokens[:, done : done + size], cache)
        parts.append(logits)
        done += size
    assert done == LENGTH and int(cache["length"]) == LENGTH
    near = 1e-4 if config.linear else 2e-5  # whose chunks are others
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), full, atol=near, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_of_one_position(name):
    config, params = tiny(name)
    tokens = tiny_tokens(config)
    full = forward(config, params, tokens)
    one = Decoder(config).apply({"params": params}, tokens, at=5)
    np.testing.assert_allclose(one, full[:, 5:6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_params_tree_is_what_weight_names_say(name):
    config, params = tiny(name)
    tree = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_token_outside_every_window_is_not_seen(name):
    """With windowed layers only, information travels window - 1 positions a layer."""
    config, params = tiny(name)
    config = dataclasses.replace(config, global_layers=())
    tokens = tiny_tokens(config, batch=1)
    other = tokens.at[0, 0].set((tokens[0, 0] + 1) % config.vocab)
    a, b = (forward(config, params, t) for t in (tokens, other))
    reach = config.layers * (config.window - 1)
    assert jnp.abs(a - b)[0, reach].max() > 0
    assert jnp.abs(a - b)[0, reach + 1 :].max() == 0


def test_rotation_is_complex_multiplication(rng):
    x = rng.normal(size=(1, 5, 2, 8)).astype(np.float32)
    frequencies = rope_frequencies(8, 100.0, None)
    np.testing.assert_allclose(frequencies, 100.0 ** (-np.arange(0, 8, 2) / 8), rtol=1e-6)
    y = np.asarray(rotate(jnp.asarray(x), jnp.arange(5), frequencies))
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arange(5)[:, None] * np.asarray(frequencies))[None, :, None, :]
    np.testing.assert_allclose(y, np.concatenate([z.real, z.imag], axis=-1), atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("window", [None, 3, 150])
@pytest.mark.parametrize("length", [1, 128, 129, 700])
def test_attention_in_blocks_is_attention(rng, length, window):
    """Against softmax attention written out in float64, head by head."""
    q, k, v = (rng.normal(size=(1, length, heads, 4)) for heads in (4, 2, 2))
    ours = attend_causally(
        jnp.asarray(q, jnp.float32), *(jnp.asarray(x[0].swapaxes(0, 1), jnp.float32) for x in (k, v)), window, 0.7, 2.0
    )
    i, j = np.indices((length, length))
    hidden = (j > i) | (i - j >= (window or length))
    for head in range(4):
        scores = 2.0 * np.tanh(0.7 * q[0, :, head] @ k[0, :, head // 2].T / 2.0)
        p = np.exp(np.where(hidden, -np.inf, scores))
        o = p / p.sum(axis=1, keepdims=True) @ v[0, :, head // 2]
        np.testing.assert_allclose(ours[0, :, 4 * head : 4 * head + 4], o, atol=1e-5)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = rope_frequencies(128, 500000.0, None), rope_frequencies(128, 500000.0, scaling)
    wavelength = 2 * np.pi / np.asarray(plain)
    ratio = np.asarray(plain / scaled)
    np.testing.assert_allclose(ratio[wavelength < 8192 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8.0, rtol=1e-6)
    between = ratio[(wavelength > 8192 / 4) & (wavelength < 8192)]
    assert len(between) > 2 and (np.diff(between) > 0).all() and (between > 1).all() and (between < 8).all()


def test_yarn_keeps_fast_and_divides_slow_frequencies():
    scaling = RopeScaling("yarn", 4.0, original_max_position=4096)
    plain, scaled = rope_frequencies(128, 10000.0, None), rope_frequencies(128, 10000.0, scaling)
    turns, ratio = 4096 * np.asarray(plain) / (2 * np.pi), np.asarray(plain / scaled)
    np.testing.assert_allclose(ratio[turns > 40], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 4.0, rtol=1e-6)
    between = ratio[(turns < 30) & (turns > 1.2)]
    assert len(between) > 10 and (np.diff(between) > 0).all()


def test_longrope_divides_by_the_text_so_far():
    scaling = RopeScaling("longrope", original_max_position=16, divisors=(2.0, 8.0), short_divisors=(1.0, 3.0))
    plain = rope_frequencies(4, 100.0, None)
    short, long = (plain / rope_frequencies(4, 100.0, scaling, n) for n in (16, 17))
    np.testing.assert_allclose(short, [1.0, 3.0], rtol=1e-6)
    np.testing.assert_allclose(long, [2.0, 8.0], rtol=1e-6)


def test_bfloat16_activations_stay_near_float32():
    config, params = tiny("llama")
    tokens = tiny_tokens(config)
    exact = forward(config, params, tokens)
    rough = Decoder(config, jnp.bfloat16).apply({"params": params}, tokens)
    assert rough.dtype == jnp.float32
    assert float(jnp.abs(rough - exact).mean() / jnp.abs(exact).mean()) < 0.03


def test_config_is_hashable_and_layerwise():
    config = DecoderConfig(8, 4, 4, 4, 2, 1, 2, window=3, global_layers=(1, 3), local_rope_theta=5.0)
    assert {config: 1}[config] == 1
    assert [config.layer_window(i) for i in range(4)] == [3, None, 3, None]
    assert config.layer_theta(0) == (5.0, None) and config.layer_theta(1) == (10000.0, None)
