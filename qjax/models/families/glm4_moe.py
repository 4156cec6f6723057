"""GLM-4.5 and 4.6: half of each head rotated, norms of q and k in the large ones, DeepSeek-V3's experts."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import counts_from_gguf, counts_to_gguf
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.scaling import rotary_dim_from_hf

_SIGMOID = 2  # llama.cpp's expert_gating_func


def _from_hf(keys: Keys, common: Fields) -> Fields:
    width, groups = keys.count("moe_intermediate_size"), keys.get("n_group") or 1
    return {
        "qkv_bias": bool(keys.get("attention_bias")),
        "qk_norm": bool(keys.get("use_qk_norm")),
        "rotary_dim": rotary_dim_from_hf(keys, common["head_dim"]),
        "experts": keys.count("n_routed_experts"),
        "experts_used": keys.count("num_experts_per_tok"),
        "expert_hidden": width,
        "expert_norm": bool(keys.get("norm_topk_prob")),
        "expert_scale": keys.number("routed_scaling_factor"),
        "expert_groups": groups if groups > 1 else 0,
        "expert_groups_used": keys.count("topk_group") if groups > 1 else 0,
        "dense_layers": tuple(range(min(keys.get("first_k_dense_replace"), common["layers"]))),
        "shared_hidden": width * keys.count("n_shared_experts"),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | {
        "attention_bias": c.qkv_bias,
        "use_qk_norm": c.qk_norm,
        "partial_rotary_factor": c.rotated / c.head_dim,
        "n_routed_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "moe_intermediate_size": c.expert_hidden,
        "norm_topk_prob": c.expert_norm,
        "routed_scaling_factor": c.expert_scale,
        "n_group": c.expert_groups or 1,
        "topk_group": c.expert_groups_used or 1,
        "first_k_dense_replace": len(c.dense_layers),
        "n_shared_experts": c.shared_hidden // c.expert_hidden,
        "num_nextn_predict_layers": 0,  # transformers takes one for granted
    }


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    if more := keys.get("nextn_predict_layers", 0):
        raise UserError(
            f"{keys.where}nextn_predict_layers = {more} is not supported: the last block guesses the token after the "
            "next; convert without it"
        )
    width = keys.count("expert_feed_forward_length")
    return counts_from_gguf(keys) | {
        "expert_hidden": width,
        "expert_norm": bool(keys.get("expert_weights_norm", False)),
        "expert_scale": keys.number("expert_weights_scale", 1.0),
        "dense_layers": tuple(range(keys.get("leading_dense_block_count", 0))),
        "shared_hidden": width * keys.count("expert_shared_count"),
    }


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.expert_groups:
        raise UserError("llama.cpp's glm4moe has no groups of experts")
    return counts_to_gguf(c) | {
        "leading_dense_block_count": len(c.dense_layers),
        "expert_feed_forward_length": c.expert_hidden,
        "expert_shared_count": c.shared_hidden // c.expert_hidden,
        "expert_weights_scale": c.expert_scale,
        "expert_weights_norm": c.expert_norm,
        "expert_gating_func": _SIGMOID,
    }


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
    hf_names={f"mlp/shared/{part}": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")},
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
