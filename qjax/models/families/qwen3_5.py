"""Qwen3.5, dense and with experts: three layers of four have linear attention; a gate stands behind the others'.

Its texts are those of a model of images, whose positions have three parts: of a text they are the same, and
`mrope_section` says only what belongs to which.
"""

from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.experts import OPTIONS, STACKED_NAMES, counts_from_hf, widths_from_gguf, widths_to_gguf
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.linear import LINEAR_ABSENT, linear_from_gguf, linear_from_hf, linear_to_gguf, linear_to_hf
from qjax.models.families.scaling import rotary_dim_from_hf


def _sections(said: Any, key: str) -> tuple[int, ...]:
    if not isinstance(said, list | tuple | np.ndarray) or not 3 <= len(said) <= 4 or any(int(n) < 0 for n in said):
        raise UserError(f"{key} = {str(said)[:40]}; expected three numbers")
    return tuple(int(n) for n in said[:3])


def _from_hf(keys: Keys, common: Fields) -> Fields:
    spelled = [keys.values.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    said = next((rope["mrope_section"] for rope in spelled if "mrope_section" in rope), keys.get("mrope_section"))
    return {
        "rotary_dim": rotary_dim_from_hf(keys, common["head_dim"]),
        "linear": linear_from_hf(keys, common["layers"]),
        "rope_sections": _sections(said, "config.json: mrope_section"),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    theta, scaling = hf.pop("rope_theta"), hf.pop("rope_scaling")
    rope = (scaling or {"rope_type": "default"}) | {
        "rope_theta": theta,
        "partial_rotary_factor": c.rotated / c.head_dim,
        "mrope_section": list(c.rope_sections),
        "mrope_interleaved": True,
    }
    return hf | {"rope_parameters": rope} | (linear_to_hf(c, c.linear) if c.linear else {})


def _from_gguf(keys: Keys, common: Fields) -> Fields:
    sections = _sections(keys.get("rope.dimension_sections"), f"{keys.where}rope.dimension_sections")
    return {"linear": linear_from_gguf(keys, common["layers"]), "rope_sections": sections}


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.linear is None:
        raise UserError("llama.cpp's qwen35 has layers of linear attention")
    return linear_to_gguf(c, c.linear) | {"rope.dimension_sections": [*c.rope_sections, 0]}


def _moe_from_hf(keys: Keys, common: Fields) -> Fields:
    shared = {"shared_hidden": keys.count("shared_expert_intermediate_size")}
    return _from_hf(keys, common) | counts_from_hf(keys, "moe_intermediate_size") | shared


def _moe_to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return _to_hf(c, hf) | {
        "num_experts": c.experts,
        "num_experts_per_tok": c.experts_used,
        "moe_intermediate_size": c.expert_hidden,
        "shared_expert_intermediate_size": c.shared_hidden,
    }


def _moe_from_gguf(keys: Keys, common: Fields) -> Fields:
    return _from_gguf(keys, common) | widths_from_gguf(keys)


def _moe_to_gguf(c: DecoderConfig) -> Fields:
    return _to_gguf(c) | widths_to_gguf(c)


_ABSENT = {
    "vocab_size": 248320,
    "num_attention_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "mrope_section": (11, 11, 10),
} | LINEAR_ABSENT
_TRAITS = {"norm_offset": 1.0, "qk_norm": True, "attn_gate": True}
QWEN3_5 = Family(
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    arch="qwen35",
    traits=_TRAITS,
    absent=_ABSENT
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "num_key_value_heads": 4},
    options=frozenset({"partial_rotary_factor", "mtp"}),
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
QWEN3_5_MOE = Family(
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    arch="qwen35moe",
    traits=_TRAITS | {"shared_gate": True},
    absent=_ABSENT
    | {
        "hidden_size": 2048,
        "intermediate_size": "moe_intermediate_size",
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
    absent_gguf={"feed_forward_length": "expert_feed_forward_length"},
    options=OPTIONS | {"partial_rotary_factor", "mtp"},
    expert_columns="rows",
    hf_names=STACKED_NAMES,
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_moe_from_hf,
    to_hf=_moe_to_hf,
    from_gguf=_moe_from_gguf,
    to_gguf=_moe_to_gguf,
)
