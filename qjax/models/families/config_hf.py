"""Hugging Face's config.json <-> DecoderConfig: what all families share; the rest is each family's own.

Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` + `rope_local_base_freq`, and the
`rope_parameters` of transformers 5. The first is written, because every version reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.families.family import Family
from qjax.models.families.keys import Keys
from qjax.models.families.scaling import scaling_from_hf, scaling_to_hf
from qjax.models.families.table import FAMILIES

_ACTIVATIONS = {
    "silu": ("silu", "clamped_swiglu"),
    "swish": ("silu", "clamped_swiglu"),
    "gelu_pytorch_tanh": ("gelu_tanh",),
    "gelu_new": ("gelu_tanh",),
}
# What a model_type that many ask for would take.
MISSING = {
    "gemma3": 'there is no text_config; its language model alone is "gemma3_text"',
    "llama4": 'there is no text_config; its language model alone is "llama4_text"',
    "deepseek_v32": "sparse attention is missing",
    "qwen3_5": 'there is no text_config; its language model alone is "qwen3_5_text"',
    "qwen3_5_moe": 'there is no text_config; its language model alone is "qwen3_5_moe_text"',
    "kimi_linear": "linear attention with a gate for each number is missing",
    "deepseek_v4": "compressed sparse attention is missing",
    "glm5_next": "sparse and linear attention are missing",
    "gemma4": 'there is no text_config; its language model alone is "gemma4_text"',
    "gemma4_unified": "what its text_config leaves out is missing; gemma4 stands",
    "gemma3n": "its embeddings by layer are missing",
    "cohere": "LayerNorm and attention beside the MLP are missing",
    "phi": "LayerNorm and attention beside the MLP are missing",
    "olmo": "LayerNorm without gains is missing",
    "glm": "its GGUF architecture chatglm is missing; glm4 stands",
}
# Options that change the function: allowed only at these values, but for the families that read them.
_UNSUPPORTED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Read the contents of a config.json.

    Raises:
      UserError: an unknown model_type, a missing or malformed key, or an option that would change what is computed
        and is not supported; the message names key and value.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        lacks = MISSING.get(kind) if isinstance(kind, str) else None
        why = f": {lacks}" if lacks else ""
        raise UserError(f"config.json: model_type {kind!r} is not supported{why}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for key, allowed in _UNSUPPORTED.items():
        if key not in family.options and hf.get(key) not in allowed:
            raise UserError(f"config.json: {key} = {hf[key]!r} is not supported for model_type {kind!r}")
    keys = Keys(hf, family.absent)
    heads, dim = keys.count("num_attention_heads"), keys.count("hidden_size")
    theta, scaling, local_theta = _rope(keys, family)
    common: dict[str, Any] = {
        "vocab": keys.count("vocab_size"),
        "dim": dim,
        "hidden": keys.count("intermediate_size"),
        "layers": keys.count("num_hidden_layers"),
        "heads": heads,
        "kv_heads": keys.count("num_key_value_heads", heads if "num_key_value_heads" in family.absent else None),
        "head_dim": keys.count("head_dim", dim // heads),
        "context": keys.count("max_position_embeddings"),
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "local_rope_theta": local_theta,
        "tied": bool(keys.get("tie_word_embeddings", False)),
        "family": kind,
    }
    fields = common | dict(family.traits) | family.from_hf(keys, common)
    if fields.get("window") is None:
        fields["local_rope_theta"] = None
    config = DecoderConfig(**fields)
    _check_activation(hf, config)
    return check_dimensions(config, "config.json")


_NAMES = {"window": "sliding_window", "dim": "hidden_size", "context": "context length"}


def check_dimensions(config: DecoderConfig, where: str) -> DecoderConfig:
    """The config itself, or a UserError where its numbers cannot make a decoder."""
    for name, value in vars(config).items():
        if type(value) is int and value >= 1 << 31:
            raise UserError(f"{where}: {_NAMES.get(name, name)} = {value} is more than any model has")
    for kv_heads in (config.kv_heads, config.global_kv_heads or config.kv_heads):
        if config.heads % kv_heads:
            raise UserError(f"{where}: {config.heads} attention heads are no multiple of {kv_heads} key-value heads")
    if config.experts_used > config.experts:
        raise UserError(f"{where}: {config.experts_used} experts a token are more than the {config.experts} there are")
    for head_dim in (config.head_dim, config.global_head_dim):
        if head_dim % 2:
            raise UserError(f"{where}: head size {head_dim} is odd; rotary embeddings need an even one")
    return config


def _check_activation(hf: Mapping[str, Any], config: DecoderConfig) -> None:
    # Gemma's first files say hidden_act = "gelu" where hidden_activation holds what is meant.
    key = "hidden_activation" if hf.get("hidden_activation") is not None else "hidden_act"
    value = hf.get(key)
    if value is not None and config.activation not in _ACTIVATIONS.get(str(value), ()):
        raise UserError(f"config.json: {key} = {value!r} is not supported for model_type {config.family!r}")


def _rope(keys: Keys, family: Family) -> tuple[float, RopeScaling | None, float | None]:
    """(theta, scaling, theta of the windowed layers) from either spelling."""
    hf = keys.values
    new = hf.get("rope_parameters", family.absent.get("rope_parameters"))
    local_theta = keys.optional("rope_local_base_freq")

    def scaling(rope: Mapping[str, Any] | None, key: str) -> RopeScaling | None:
        part, kind = (rope or {}).get("partial_rotary_factor", 1.0), (rope or {}).get("rope_type")
        if part != 1.0 and "partial_rotary_factor" not in family.options and kind != "proportional":
            raise UserError(f"config.json: {key}.partial_rotary_factor = {part!r} is not supported")
        return scaling_from_hf(rope, key, keys, family.options)

    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(key), Mapping | None):
            raise UserError(f"config.json: {key} = {hf[key]!r}; expected an object or null")
    if new is None:
        old = hf.get("rope_scaling") or family.absent.get("rope_scaling")
        return keys.number("rope_theta", 10000.0), scaling(old, "rope_scaling"), local_theta
    if "full_attention" in new or "sliding_attention" in new:
        full, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
        if scaling(local, "rope_parameters.sliding_attention") is not None:
            raise UserError("config.json: rope_parameters.sliding_attention is scaled, which is not supported")
        local_theta = keys.positive(
            "rope_parameters.sliding_attention.rope_theta", local.get("rope_theta", local_theta)
        )
    else:
        full = new
    theta = keys.positive("rope_parameters.rope_theta", full.get("rope_theta", keys.get("rope_theta", 10000.0)))
    return theta, scaling(full, "rope_parameters"), local_theta


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The contents of a config.json; `config_from_hf` reads back the same record.

    Raises:
      UserError: the family's config.json has no key for something in `config`.
    """
    c = config
    family = known_family(c)
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": c.family,
        "vocab_size": c.vocab,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling_to_hf(c.rope_scaling),
        "tie_word_embeddings": c.tied,
        "hidden_act": "gelu_pytorch_tanh" if c.activation == "gelu_tanh" else "silu",
    }
    hf = family.to_hf(c, hf)
    check_equal(c, config_from_hf(hf), f"a config.json of model_type {c.family!r}")
    return hf


def known_family(config: DecoderConfig) -> Family:
    """The config's family, or a UserError where the table has none of the name."""
    if config.family not in FAMILIES:
        raise UserError(f"family {config.family!r} is unknown; known: {', '.join(FAMILIES)}")
    return FAMILIES[config.family]


def check_equal(config: DecoderConfig, back: DecoderConfig, where: str) -> None:
    """Raise UserError, naming the field, unless a config survived a file format."""
    for field in dataclasses.fields(config):
        want, got = getattr(config, field.name), getattr(back, field.name)
        if want != got:
            raise UserError(f"{where} cannot say {field.name} = {want!r} (it would be read back as {got!r})")
