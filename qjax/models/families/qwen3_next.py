"""Qwen3-Next: three layers of four have linear attention, a gate stands behind the others', experts in every layer."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import (
    OPTIONS,
    counts_from_hf,
    dense_layers_from_hf,
    widths_from_gguf,
    widths_to_gguf,
)
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.linear import LINEAR_ABSENT, linear_from_gguf, linear_from_hf, linear_to_gguf, linear_to_hf
from qjax.models.families.scaling import rotary_dim_from_hf


def _from_hf(keys: Keys, common: Fields) -> Fields:
    layers = common["layers"]
    return counts_from_hf(keys, "moe_intermediate_size") | {
        "rotary_dim": rotary_dim_from_hf(keys, common["head_dim"]),
        "linear": linear_from_hf(keys, layers, tiled=False),
        "expert_norm": bool(keys.get("norm_topk_prob")),
        "shared_hidden": keys.count("shared_expert_intermediate_size"),
        "dense_layers": dense_layers_from_hf(keys, layers),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | (linear_to_hf(c, c.linear) if c.linear else {}) | {
        "partial_rotary_factor": c.rotated / c.head_dim,
        "num_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "moe_intermediate_size": c.expert_hidden,
        "norm_topk_prob": c.expert_norm,
        "shared_expert_intermediate_size": c.shared_hidden,
        "mlp_only_layers": list(c.dense_layers),
        "decoder_sparse_step": 1,
    }  # fmt: skip


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    return widths_from_gguf(keys) | {"linear": linear_from_gguf(keys, common["layers"], tiled=False)}


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.linear is None:
        raise UserError("llama.cpp's qwen3next has layers of linear attention")
    return linear_to_gguf(c, c.linear) | widths_to_gguf(c)


QWEN3_NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    arch="qwen3next",
    traits={"norm_offset": 1.0, "qk_norm": True, "attn_gate": True, "shared_gate": True},
    absent={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
    }
    | LINEAR_ABSENT,
    absent_gguf={"feed_forward_length": "expert_feed_forward_length"},
    options=OPTIONS | {"partial_rotary_factor", "mtp"},
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
