"""DeepSeek-V2 and V3: latent attention; experts, chosen within some groups of them only, and one that sees every token.

V2 takes a softmax and ranks a group by its best expert; V3 takes sigmoids, chooses by them plus a bias that is no part
of a token's shares, and ranks a group by its two best. llama.cpp calls both `deepseek2`, and ranks groups as V3 does.
"""

import dataclasses

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import (
    SHARED_NAMES,
    SIGMOID,
    routed_from_gguf,
    routed_from_hf,
    routed_to_gguf,
    routed_to_hf,
)
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys

_LITE = (26, 27)  # llama.cpp knows models whose queries come directly by their number of layers
_EPS = 1e-6  # of the norms inside attention in transformers, whatever rms_norm_eps is; llama.cpp has one for all


def _from_hf(keys: Keys, common: Fields) -> Fields:
    if common["norm_eps"] != _EPS:
        raise UserError(f"config.json: rms_norm_eps = {common['norm_eps']} is not supported: expected {_EPS}")
    if common["kv_heads"] != common["heads"]:
        raise UserError("config.json: num_key_value_heads differs from num_attention_heads in latent attention")
    if keys.get("moe_layer_freq", 1) != 1:
        raise UserError(f"config.json: moe_layer_freq = {keys.get('moe_layer_freq')!r} is not supported; expected 1")
    rotated = keys.count("qk_rope_head_dim")
    scaling, mscale = common["rope_scaling"], _mscale(keys)
    return routed_from_hf(keys, common["layers"]) | {
        "head_dim": keys.count("qk_nope_head_dim") + rotated,
        "rotary_dim": rotated,
        "value_dim": keys.count("v_head_dim"),
        "kv_rank": keys.count("kv_lora_rank"),
        "query_rank": keys.count("q_lora_rank") if keys.get("q_lora_rank") else 0,
        "rope_scaling": scaling and dataclasses.replace(scaling, mscale=mscale),
        "rope_pairs": bool(keys.get("rope_interleave", True)),
    }


def _mscale(keys: Keys) -> float:
    spelled = [keys.values.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    return float(next((rope["mscale_all_dim"] for rope in spelled if rope.get("mscale_all_dim")), 0.0))


def _v2_from_hf(keys: Keys, common: Fields) -> Fields:
    fields, method = _from_hf(keys, common), keys.get("topk_method", "greedy")
    if method == "greedy":
        fields |= {"expert_groups": 0, "expert_groups_used": 0}
    elif method != "group_limited_greedy":
        raise UserError(f"config.json: topk_method = {method!r}; expected greedy or group_limited_greedy")
    if keys.get("norm_topk_prob"):
        raise UserError("config.json: norm_topk_prob = True is not supported for model_type 'deepseek_v2'")
    return fields


def _v3_from_hf(keys: Keys, common: Fields) -> Fields:
    return _from_hf(keys, common) | {"expert_norm": bool(keys.get("norm_topk_prob"))}


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    hf = {key: value for key, value in hf.items() if key != "head_dim"}
    if c.rope_scaling is not None and c.rope_scaling.mscale:
        hf["rope_scaling"] = hf["rope_scaling"] | {"mscale_all_dim": c.rope_scaling.mscale}
    grouped = {"topk_method": "group_limited_greedy" if c.expert_groups else "greedy"}
    return hf | (grouped if c.family == "deepseek_v2" else {"rope_interleave": c.rope_pairs}) | routed_to_hf(c) | {
        "qk_nope_head_dim": c.head_dim - c.rotated,
        "qk_rope_head_dim": c.rotated,
        "v_head_dim": c.value_size,
        "kv_lora_rank": c.kv_rank,
        "q_lora_rank": c.query_rank or None,
    }  # fmt: skip


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    groups = keys.get("expert_group_count", 1)
    sigmoid = keys.get("expert_gating_func", 1) == SIGMOID
    if keys.get("attention.key_length_mla") is not None:
        raise UserError(
            f"{keys.where}attention.key_length_mla: attn_kv_b split in two is not supported; convert without --mla"
        )
    return routed_from_gguf(keys) | {
        "family": "deepseek_v3" if sigmoid else "deepseek_v2",
        "router": "sigmoid" if sigmoid else "softmax",
        "router_bias": sigmoid,
        "expert_group_best": 2 if sigmoid else 1,
        "value_dim": keys.count("attention.value_length"),
        "kv_rank": keys.count("attention.kv_lora_rank"),
        "query_rank": keys.get("attention.q_lora_rank", 0),
        "expert_groups": groups if groups > 1 else 0,
        "expert_groups_used": keys.count("expert_group_used_count") if groups > 1 else 0,
    }


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.expert_groups and c.expert_group_best != 2:
        raise UserError(
            "llama.cpp ranks groups of experts by their two best, DeepSeek-V2 (group_limited_greedy) by one"
        )
    if bool(c.query_rank) == (c.layers in _LITE):
        has = "needs" if not c.query_rank else "cannot have"
        raise UserError(f"llama.cpp's deepseek2 {has} q_lora_rank null where there are {_LITE} layers, and only there")
    if c.rope_scaling is not None:
        raise UserError("llama.cpp's deepseek2 with a rotary scaling is not supported: its factors of scores differ")
    said: Fields = routed_to_gguf(c) | {
        "attention.value_length": c.value_size,
        "attention.kv_lora_rank": c.kv_rank,
    }
    said |= {"attention.q_lora_rank": c.query_rank} if c.query_rank else {}
    groups = {"expert_group_count": c.expert_groups, "expert_group_used_count": c.expert_groups_used}
    return said | (groups if c.expert_groups else {})


_OPTIONS = frozenset({"experts", "latent"})
DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    arch="deepseek2",
    traits={"rope_pairs": True, "expert_norm": False},
    absent={
        "max_position_embeddings": 2048,
        "num_key_value_heads": "num_attention_heads",
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    options=_OPTIONS,
    hf_names=SHARED_NAMES,
    from_hf=_v2_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    arch="deepseek2",
    traits={"router": "sigmoid", "router_bias": True, "expert_group_best": 2},
    absent={
        "max_position_embeddings": 4096,
        "num_key_value_heads": "num_attention_heads",
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
    },
    options=_OPTIONS,
    hf_names=SHARED_NAMES,
    from_hf=_v3_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
