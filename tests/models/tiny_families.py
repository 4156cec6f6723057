"""Small configs of every family, as config.json spells them, with every option active within 24 positions."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.families import config_from_hf, weight_names

LENGTH = 24

_BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_MIXED = ["sliding_attention", "full_attention"]

TINY = {
    "llama": {"model_type": "llama"},
    "llama-mha": {"model_type": "llama", "num_key_value_heads": 4, "head_dim": None, "rope_theta": 500.0},
    "llama-tied-llama3": {"model_type": "llama", "tie_word_embeddings": True, "rope_scaling": _LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-v5-spelling": {"model_type": "llama", "rope_parameters": _LLAMA3 | {"rope_theta": 1000.0}},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral-full": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": None, "rope_theta": 1e6},
    "qwen2-window": {
        "model_type": "qwen2",
        "head_dim": None,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3-window": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": _MIXED,
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 7,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "gemma2-no-caps": {
        "model_type": "gemma2",
        "sliding_window": 7,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 7,
        "layer_types": _MIXED,
        "query_pre_attn_scalar": 16,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "tie_word_embeddings": True,
    },
    "gemma3-pattern": {
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
}
TINY = {name: _BASE | extra for name, extra in TINY.items()}
TINY = {name: {k: v for k, v in hf.items() if (k, v) != ("head_dim", None)} for name, hf in TINY.items()}


def tiny(name):
    """(DecoderConfig, random dense params with lively norms and biases)."""
    config = config_from_hf(TINY[name])
    rng = np.random.default_rng(1)
    params = {}
    for weight in weight_names(config):
        value = rng.normal(size=weight.shape).astype(np.float32)
        if weight.path[-1] == "scale":
            value = 1 - weight.offset + 0.3 * value
        elif weight.path[-1] == "bias":
            value = 0.5 * value
        else:  # embeddings of size one; kernels that keep the size
            value = value / (1.0 if weight.path[0] == "embed" else weight.shape[0] ** 0.5)
        node = params
        for part in weight.path[:-1]:
            node = node.setdefault(part, {})
        node[weight.path[-1]] = jnp.asarray(value)
    return config, params


def tiny_tokens(config, batch=2, length=LENGTH):
    """Random token ids, i32[batch, length]."""
    return jax.random.randint(jax.random.key(7), (batch, length), 0, config.vocab)
