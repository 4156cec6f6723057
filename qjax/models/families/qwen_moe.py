"""Qwen2-MoE and Qwen3-MoE: Qwens with experts; those of 2 have one more, gated, that sees every token."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import (
    OPTIONS,
    counts_from_gguf,
    counts_from_hf,
    dense_layers_from_hf,
    everywhere_to_gguf,
)
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.mistral import window_from_hf
from qjax.models.families.qwen import check_heads, windows_to_qwen
from qjax.models.families.windows import windows_from_hf

_EXPERTS, _SHARED = "expert_feed_forward_length", "expert_shared_feed_forward_length"


def _from_hf(keys: Keys, common: Fields) -> Fields:
    return counts_from_hf(keys, "moe_intermediate_size") | {
        "expert_norm": bool(keys.get("norm_topk_prob")),
        "dense_layers": dense_layers_from_hf(keys, common["layers"]),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | {
        "num_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "moe_intermediate_size": c.expert_hidden,
        "norm_topk_prob": c.expert_norm,
        "mlp_only_layers": list(c.dense_layers),
        "decoder_sparse_step": 1,
    }


def _qwen2_from_hf(keys: Keys, common: Fields) -> Fields:
    if not keys.get("qkv_bias"):
        raise UserError("config.json: qkv_bias = False is not supported for model_type 'qwen2_moe'")
    fields = _from_hf(keys, common) | {"shared_hidden": keys.count("shared_expert_intermediate_size")}
    if not keys.get("use_sliding_window", False):
        return fields
    last = keys.get("max_window_layers")  # every second one of the first
    return fields | windows_from_hf(keys, lambda layers: tuple(i for i in range(layers) if i % 2 or i >= last))


def _qwen2_to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return windows_to_qwen(c, _to_hf(c, hf)) | {"shared_expert_intermediate_size": c.shared_hidden, "qkv_bias": True}


def _qwen2_from_gguf(keys: Keys, common: Fields) -> Fields:
    return counts_from_gguf(keys) | {
        "expert_hidden": keys.count(_EXPERTS, common["hidden"] // keys.count("expert_used_count")),
        "shared_hidden": keys.count(_SHARED, common["hidden"]),
        "expert_norm": False,
    }


def _qwen2_to_gguf(c: DecoderConfig) -> Fields:
    return check_heads(c) | everywhere_to_gguf(c) | {_EXPERTS: c.expert_hidden, _SHARED: c.shared_hidden}


def _qwen3_from_hf(keys: Keys, common: Fields) -> Fields:
    window = window_from_hf(keys, common) if keys.get("use_sliding_window", False) else {}
    return _from_hf(keys, common) | window


def _qwen3_to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return _to_hf(c, hf) | {"use_sliding_window": c.window is not None, "sliding_window": c.window}


def _qwen3_from_gguf(keys: Keys, common: Fields) -> Fields:
    width = keys.count(_EXPERTS, common["hidden"] // keys.count("expert_used_count"))
    return counts_from_gguf(keys) | {"expert_hidden": width}


def _qwen3_to_gguf(c: DecoderConfig) -> Fields:
    return everywhere_to_gguf(c) | {_EXPERTS: c.expert_hidden}


_ABSENT = {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
}
QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    arch="qwen2moe",
    traits={"qkv_bias": True, "shared_gate": True},
    absent=_ABSENT
    | {
        "intermediate_size": 5632,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "qkv_bias": True,
    },
    options=OPTIONS,
    from_hf=_qwen2_from_hf,
    to_hf=_qwen2_to_hf,
    from_gguf=_qwen2_from_gguf,
    to_gguf=_qwen2_to_gguf,
)
QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    arch="qwen3moe",
    traits={"qk_norm": True},
    absent=_ABSENT
    | {
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    options=OPTIONS,
    from_hf=_qwen3_from_hf,
    to_hf=_qwen3_to_hf,
    from_gguf=_qwen3_from_gguf,
    to_gguf=_qwen3_to_gguf,
)
