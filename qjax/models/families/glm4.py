"""GLM-4 (0414): norms in front and behind; half of each head is rotated, by neighbours; gate and up are one weight."""

from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.scaling import rotary_dim_from_hf


def _from_hf(keys: Keys, common: Fields) -> Fields:
    return {
        "qkv_bias": bool(keys.get("attention_bias")),
        "rotary_dim": rotary_dim_from_hf(keys, common["head_dim"]),
    }


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | {"attention_bias": c.qkv_bias, "partial_rotary_factor": c.rotated / c.head_dim}


GLM4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    arch="glm4",
    traits={"post_norms": True, "rope_pairs": True, "fused_mlp": True},
    absent={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    options=frozenset({"partial_rotary_factor", "attention_bias"}),
    hf_names={"attn_post_norm": "post_self_attn_layernorm", "mlp_post_norm": "post_mlp_layernorm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
)
