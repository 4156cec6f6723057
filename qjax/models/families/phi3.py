"""Phi-3, 3.5 and 4: q, k and v in one weight, gate and up in another; longrope; Phi-4-mini rotates a part of a head."""

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.mistral import window_from_hf
from qjax.models.families.scaling import rotary_dim_from_hf


def _from_hf(keys: Keys, common: Fields) -> Fields:
    return window_from_hf(keys, common) | {"rotary_dim": rotary_dim_from_hf(keys, common["head_dim"])}


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    hf = hf | {"sliding_window": c.window, "partial_rotary_factor": c.rotated / c.head_dim}
    if c.rope_scaling is not None:
        hf["original_max_position_embeddings"] = c.rope_scaling.original_max_position
    return hf


def _to_gguf(c: DecoderConfig) -> Fields:
    if c.heads * c.head_dim != c.dim:
        raise UserError(
            f"llama.cpp's phi3 wants heads x head_dim = embedding_length, got {c.heads} x {c.head_dim} and {c.dim}"
        )
    return {}


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    arch="phi3",
    traits={"fused_qkv": True, "fused_mlp": True},
    absent={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "num_key_value_heads": "num_attention_heads",
        "rms_norm_eps": 1e-5,
    },
    options=frozenset({"partial_rotary_factor", "longrope"}),
    from_hf=_from_hf,
    to_hf=_to_hf,
    to_gguf=_to_gguf,
)
