"""A decoder in pieces is the decoder."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import TINY, tiny, tiny_tokens

from qjax.evaluate.perplexity import network_of_decoder
from qjax.models.decoder import Decoder
from qjax.models.stages import stages_of

ALIKE = {"mistral": 1, "llama": 1, "qwen2-window": 2, "qwen3-window": 2, "gemma2": 2, "gemma3": 2, "gemma3-pattern": 2}
ALIKE |= {"smollm3": 2, "olmo3": 2, "phi3": 1, "mixtral": 1, "qwen2_moe-mixed": 2, "deepseek_v3": 2}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", TINY)
def test_embed_blocks_head_make_the_decoder(name):
    config, params = tiny(name)
    tokens = tiny_tokens(config)
    stages = stages_of(config)
    assert stages.tied == config.tied and len(stages.blocks) == config.layers
    x = stages.embed({"embed": params["embed"]}, tokens)
    for block, layer in zip(stages.blocks, stages.names, strict=True):
        x = block(params[layer], x)
    last = "embed" if config.tied else "head"
    logits = stages.head({"final_norm": params["final_norm"], last: params[last]}, x)
    expected = np.asarray(Decoder(config).apply({"params": params}, tokens))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    assert logits.dtype == jnp.float32


def test_granite_divides_its_logits_once():
    """Wherever the cut is: here behind the final norm."""
    config, params = tiny("granite")
    tokens = tiny_tokens(config)
    network = network_of_decoder(config)
    expected = np.asarray(Decoder(config).apply({"params": params}, tokens))
    hidden = network.read(params, np.asarray(tokens), 0, len(tokens), lambda *at: None)
    end = network.scoring(params, hidden.shape[-1])
    cut = network.scores(end.weights(0, end.vocab), jnp.asarray(hidden), 0, end.vocab)
    np.testing.assert_allclose(cut, expected[:, :-1], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name, different", ALIKE.items())
def test_layers_that_do_the_same_are_one_function(name, different):
    config, _ = tiny(name)
    stages = stages_of(config)
    assert len(set(stages.blocks)) == different
    assert stages_of(config) is stages
    kinds = [(config.layer_window(i), config.layer_theta(i), config.has_experts(i)) for i in range(config.layers)]
    for a, kind in zip(stages.blocks, kinds, strict=True):
        assert all((a is b) == (kind == other) for b, other in zip(stages.blocks, kinds, strict=True))
