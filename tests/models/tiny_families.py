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

_DEEPSEEK = {
    "num_key_value_heads": 4,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "rope_theta": 5000.0,
}
_LLAMA4 = {
    "model_type": "llama4_text",
    "intermediate_size": 32,
    "intermediate_size_mlp": 80,
    "num_local_experts": 6,
    "num_experts_per_tok": 1,
}
_GLM4_MOE = {
    "model_type": "glm4_moe",
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.5,
}

_GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "sliding_window": 7,
    "global_head_dim": 24,
    "tie_word_embeddings": True,
}
_QWEN3_5 = {
    "model_type": "qwen3_5_text",
    "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}

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
    "gemma": {"model_type": "gemma", "tie_word_embeddings": True, "num_key_value_heads": 1},
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
    "gemma4": _GEMMA4
    | {"layer_types": _MIXED, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 3.0}
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma4-experts": _GEMMA4
    | {"layer_types": _MIXED, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    | {"moe_intermediate_size": 32, "attention_k_eq_v": True},
    "gemma4-values": _GEMMA4 | {"num_hidden_layers": 3, "layer_types": [*_MIXED, "full_attention"]},
    "qwen3_5": _QWEN3_5 | {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5-irregular": _QWEN3_5
    | {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "tie_word_embeddings": True}
    | {"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    "qwen3_5_moe": _QWEN3_5
    | {"model_type": "qwen3_5_moe_text", "linear_num_value_heads": 4}
    | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 40},
    "qwen3_next": {
        "model_type": "qwen3_next",
        "rms_norm_eps": 1e-6,
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "attention_factor": 1.3,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen3-yarn-betas": {
        "model_type": "qwen3",
        "rope_theta": 50.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
    },
    "olmo2": {"model_type": "olmo2", "head_dim": None},
    "olmo3": {
        "model_type": "olmo3",
        "head_dim": None,
        "sliding_window": 7,
        "layer_types": _MIXED,
        "rope_theta": 1000.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "rope_theta": 1000.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "tie_word_embeddings": True},
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.5,
    },
    "phi3": {"model_type": "phi3", "head_dim": None, "sliding_window": 9},
    "phi3-longrope": {
        "model_type": "phi3",
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
            "short_factor": [1.0, 1.0, 1.25, 1.5, 2.0, 2.0],
        },
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "head_dim": None,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
    },
    "qwen2_moe-mixed": {
        "model_type": "qwen2_moe",
        "head_dim": None,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "deepseek_v2": _DEEPSEEK | {"model_type": "deepseek_v2", "routed_scaling_factor": 1.5, "first_k_dense_replace": 1},
    "deepseek_v2-lite": _DEEPSEEK
    | {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 1,
    },
    "deepseek_v3": _DEEPSEEK | {"model_type": "deepseek_v3", "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1},
    "deepseek_v3-yarn": _DEEPSEEK
    | {
        "model_type": "deepseek_v3",
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "attention_factor": 0.93,
            "mscale_all_dim": 1.3,
        },
    },
    "glm4_moe": _GLM4_MOE | {"attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 1},
    "glm4_moe-air": _GLM4_MOE | {"n_shared_experts": 2, "first_k_dense_replace": 0, "partial_rotary_factor": 0.25},
    "gpt_oss": _GPT_OSS | {"rope_scaling": _YARN | {"truncate": False}},
    "gpt_oss-windows": _GPT_OSS
    | {"rope_scaling": {"rope_type": "default"}, "layer_types": ["full_attention", "sliding_attention"]},
    "llama4": _LLAMA4
    | {"attention_chunk_size": 7, "floor_scale": 8, "attn_scale": 0.3, "no_rope_layers": [1, 0]}
    | {"rope_scaling": _LLAMA3},
    "llama4-published": _LLAMA4 | {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "num_experts_per_tok": 2},
    "glm4": {"model_type": "glm4"},
    "glm4-no-bias": {"model_type": "glm4", "attention_bias": False, "partial_rotary_factor": 0.25},
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
        if weight.path[-1].endswith("scale"):
            value = 1 - weight.offset + 0.3 * value
        elif weight.path[-1] == "conv":
            value = value / weight.shape[-1] ** 0.5
        elif weight.path[-1].endswith(("bias", "sinks", "A_log")):
            value = 0.5 * value
        else:  # embeddings of size one; kernels that keep the size
            value = value / (1.0 if weight.path[0] == "embed" else weight.shape[-2] ** 0.5)
        node = params
        for part in weight.path[:-1]:
            node = node.setdefault(part, {})
        node[weight.path[-1]] = jnp.asarray(value)
    return config, params


def tiny_tokens(config, batch=2, length=LENGTH):
    """Random token ids, i32[batch, length]."""
    return jax.random.randint(jax.random.key(7), (batch, length), 0, config.vocab)
