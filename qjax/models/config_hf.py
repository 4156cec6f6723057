"""Hugging Face's config.json <-> DecoderConfig.

Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` + `rope_local_base_freq`, and the
`rope_parameters` of transformers 5. The first is written, because every version reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.family_table import FAMILIES, Family

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# Options that change the function and that no supported family needs: allowed only at these values.
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
        hint = ' (its language model alone is "gemma3_text")' if kind == "gemma3" else ""
        raise UserError(f"config.json: model_type {kind!r} is not supported{hint}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for key, allowed in _UNSUPPORTED.items():
        if hf.get(key) not in allowed:
            raise UserError(f"config.json: {key} = {hf[key]!r} is not supported for model_type {kind!r}")

    def get(key: str, default: Any = None) -> Any:
        value = hf.get(key, family.absent.get(key))
        return default if value is None else value

    def count(key: str, default: int | None = None) -> int:
        value = get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            what = "is missing" if value is None else f"= {value!r}"
            raise UserError(f"config.json: {key} {what}; expected a positive integer")
        return value

    heads = count("num_attention_heads")
    dim = count("hidden_size")
    head_dim = count("head_dim", dim // heads)
    layers = count("num_hidden_layers")
    window, global_layers = _windows(kind, get, count, hf, layers)
    theta, scaling, local_theta = _rope(hf, get)

    def optional(key: str) -> float | None:
        return None if get(key) is None else _number(key, get(key))

    query_dim = optional("query_pre_attn_scalar")
    config = DecoderConfig(
        vocab=count("vocab_size"),
        dim=dim,
        hidden=count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=count("num_key_value_heads", heads if kind == "llama" else None),
        head_dim=head_dim,
        context=count("max_position_embeddings"),
        norm_eps=_number("rms_norm_eps", get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=bool(get("tie_word_embeddings", False)),
        family=kind,
        window=window,
        global_layers=global_layers,
        local_rope_theta=local_theta if window is not None else None,
        query_dim=None if query_dim in (None, head_dim) else query_dim,
        attn_softcap=optional("attn_logit_softcapping"),
        logit_softcap=optional("final_logit_softcapping"),
        **family.traits,
    )
    _check_activation(hf, family, config)
    return check_dimensions(config, "config.json")


_NAMES = {"window": "sliding_window", "dim": "hidden_size", "context": "context length"}


def check_dimensions(config: DecoderConfig, where: str) -> DecoderConfig:
    """The config itself, or a UserError where its numbers cannot make a decoder."""
    for name, value in vars(config).items():
        if type(value) is int and value >= 1 << 31:
            raise UserError(f"{where}: {_NAMES.get(name, name)} = {value} is more than any model has")
    if config.heads % config.kv_heads:
        raise UserError(f"{where}: {config.heads} attention heads are no multiple of {config.kv_heads} key-value heads")
    if config.head_dim % 2:
        raise UserError(f"{where}: head size {config.head_dim} is odd; rotary embeddings need an even one")
    return config


def _check_activation(hf: Mapping[str, Any], family: Family, config: DecoderConfig) -> None:
    # Gemma's first files say hidden_act = "gelu" where hidden_activation holds what is meant.
    key = "hidden_activation" if hf.get("hidden_activation") is not None else "hidden_act"
    value = hf.get(key)
    if value is not None and _ACTIVATIONS.get(str(value)) != config.activation:
        raise UserError(f"config.json: {key} = {value!r} is not supported for model_type {config.family!r}")


def _windows(kind: str, get, count, hf: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[int, ...]]:
    """(window, layers that ignore it) from sliding_window and its companions."""
    if kind == "llama" or (kind.startswith("qwen") and not get("use_sliding_window", False)):
        return None, ()
    if "sliding_window" in hf and hf["sliding_window"] is None:
        return None, ()
    types = hf.get("layer_types")
    if not isinstance(types, list | tuple | None):
        raise UserError(f"config.json: layer_types = {types!r}; expected a list")
    if kind == "mistral":
        full: tuple[int, ...] = ()
    elif types is not None:
        unknown = {str(t) for t in types} - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            what = f"{sorted(unknown)[0]!r}" if unknown else f"{len(types)} entries for {layers} layers"
            raise UserError(f"config.json: layer_types has {what}; expected full_attention or sliding_attention each")
        full = tuple(i for i, t in enumerate(types) if t == "full_attention")
    elif kind.startswith("qwen"):
        full = tuple(range(min(get("max_window_layers", 28), layers)))
    else:
        every = count("sliding_window_pattern")
        full = tuple(range(every - 1, layers, every))
    return (None, ()) if len(full) == layers else (count("sliding_window"), full)


def _rope(hf: Mapping[str, Any], get) -> tuple[float, RopeScaling | None, float | None]:
    """(theta, scaling, theta of the windowed layers) from either spelling."""
    new = hf.get("rope_parameters")
    local_theta = get("rope_local_base_freq")
    local_theta = None if local_theta is None else _number("rope_local_base_freq", local_theta)
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(key), Mapping | None):
            raise UserError(f"config.json: {key} = {hf[key]!r}; expected an object or null")
    if new is None:
        scaling = _scaling(hf.get("rope_scaling"), "rope_scaling", hf)
        return _number("rope_theta", get("rope_theta", 10000.0)), scaling, local_theta
    if "full_attention" in new or "sliding_attention" in new:
        full, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
        if _scaling(local, "rope_parameters.sliding_attention", hf) is not None:
            raise UserError("config.json: rope_parameters.sliding_attention is scaled, which is not supported")
        local_theta = _number("rope_parameters.sliding_attention.rope_theta", local.get("rope_theta", local_theta))
    else:
        full = new
    theta = _number("rope_parameters.rope_theta", full.get("rope_theta", get("rope_theta", 10000.0)))
    return theta, _scaling(full, "rope_parameters", hf), local_theta


def _scaling(rope: Mapping[str, Any] | None, key: str, hf: Mapping[str, Any]) -> RopeScaling | None:
    if not rope:
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: {key}.partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported"
        )
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise UserError(f"config.json: {key}.rope_type = {kind!r} is not supported; supported: default, linear, llama3")

    def number(name: str) -> float:
        return _number(f"{key}.{name}", rope.get(name))

    if kind == "linear":
        return RopeScaling("linear", number("factor"))
    original = rope.get("original_max_position_embeddings", hf.get("original_max_position_embeddings"))
    return RopeScaling(
        "llama3",
        number("factor"),
        number("low_freq_factor"),
        number("high_freq_factor"),
        int(_number(f"{key}.original_max_position_embeddings", original)),
    )


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        what = "is missing" if value is None else f"= {value!r}"
        raise UserError(f"config.json: {key} {what}; expected a positive number")
    return float(value)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The contents of a config.json; `config_from_hf` reads back the same record.

    Raises:
      UserError: the family's config.json has no key for something in `config`.
    """
    c = config
    if c.family not in FAMILIES:
        raise UserError(f"family {c.family!r} is unknown; known: {', '.join(FAMILIES)}")
    family = FAMILIES[c.family]
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
        "rope_scaling": _scaling_to_hf(c.rope_scaling),
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu" if c.activation == "silu" else "gelu_pytorch_tanh",
    }
    if c.family == "mistral":
        hf["sliding_window"] = c.window
    elif c.family != "llama":
        kinds = ["full_attention" if c.layer_window(i) is None else "sliding_attention" for i in range(c.layers)]
        hf["layer_types"] = kinds
        if c.window is not None:
            hf["sliding_window"] = c.window
    if c.family.startswith("qwen"):
        leading = next((i for i in range(c.layers) if c.layer_window(i) is not None), c.layers)
        hf |= {"use_sliding_window": c.window is not None, "max_window_layers": leading}
    if c.family.startswith("gemma"):
        hf["hidden_activation"] = hf.pop("hidden_act")
        hf["query_pre_attn_scalar"] = c.head_dim if c.query_dim is None else _integral(c.query_dim)
        hf["attn_logit_softcapping"] = c.attn_softcap
        hf["final_logit_softcapping"] = c.logit_softcap
    if c.family == "gemma3_text" and c.local_rope_theta is not None:
        hf["rope_local_base_freq"] = c.local_rope_theta
    check_equal(c, config_from_hf(hf), f"a config.json of model_type {c.family!r}")
    return hf


def check_equal(config: DecoderConfig, back: DecoderConfig, where: str) -> None:
    """Raise UserError, naming the field, unless a config survived a file format."""
    for field in dataclasses.fields(config):
        want, got = getattr(config, field.name), getattr(back, field.name)
        if want != got:
            raise UserError(f"{where} cannot say {field.name} = {want!r} (it would be read back as {got!r})")


def _integral(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "table":
        raise UserError("config.json cannot hold a table of rotary divisors (rope_freqs.weight of a GGUF file)")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
