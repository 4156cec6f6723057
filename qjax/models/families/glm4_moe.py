"""GLM-4.5 and 4.6: half of each head rotated, norms of q and k in the large ones, DeepSeek-V3's experts."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import (
    SHARED_NAMES,
    routed_from_gguf,
    routed_from_hf,
    routed_to_gguf,
    routed_to_hf,
)
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.scaling import rotary_dim_from_hf


def _from_hf(keys: Keys, common: Fields) -> Fields:
    return routed_from_hf(keys, common["layers"]) | {
        "qkv_bias": bool(keys.get("attention_bias")),
        "qk_norm": bool(keys.get("use_qk_norm")),
        "rotary_dim": rotary_dim_from_hf(keys, common["head_dim"]),
        "expert_norm": bool(keys.get("norm_topk_prob")),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | routed_to_hf(c) | {
        "attention_bias": c.qkv_bias,
        "use_qk_norm": c.qk_norm,
        "partial_rotary_factor": c.rotated / c.head_dim,
        "num_nextn_predict_layers": 0,  # transformers takes one for granted
    }  # fmt: skip


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    return routed_from_gguf(keys)


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.expert_groups:
        raise UserError("llama.cpp's glm4moe has no groups of experts")
    return routed_to_gguf(c)


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    arch="glm4moe",
    traits={"router": "sigmoid", "router_bias": True, "expert_group_best": 2},
    absent={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    options=frozenset({"experts", "partial_rotary_factor", "attention_bias", "use_qk_norm", "num_local_experts"}),
    hf_names=SHARED_NAMES,
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
