"""Granite: a Llama with four multipliers, of embeddings, attention scores, residual additions and logits."""

from collections.abc import Mapping

from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys

# Field -> (key of config.json, key of GGUF metadata).
_NAMES: Mapping[str, tuple[str, str]] = {
    "embed_multiplier": ("embedding_multiplier", "embedding_scale"),
    "residual_multiplier": ("residual_multiplier", "residual_scale"),
    "attn_multiplier": ("attention_multiplier", "attention.scale"),
    "logit_divisor": ("logits_scaling", "logit_scale"),
}


def _from_hf(keys: Keys, _: Fields) -> Fields:
    return {field: keys.number(name, 1.0) for field, (name, _) in _NAMES.items()}


def _to_hf(c: DecoderConfig, hf: Fields) -> Fields:
    return hf | {name: getattr(c, field) for field, (name, _) in _NAMES.items()}


def _from_gguf(keys: Keys, _: Fields) -> Fields:
    return {
        "embed_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "attn_multiplier": keys.optional("attention.scale"),
        "logit_divisor": keys.number("logit_scale"),
    }


def _to_gguf(c: DecoderConfig) -> Fields:
    said = {name: getattr(c, field) for field, (_, name) in _NAMES.items()}
    return {name: value for name, value in said.items() if value is not None}


GRANITE = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    arch="granite",
    absent={"max_position_embeddings": 2048, "num_key_value_heads": "num_attention_heads"},
    pairs=True,
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
