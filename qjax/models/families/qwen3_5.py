"""Qwen3.5: three layers of four have linear attention; what the others attend to passes a gate.

Its texts are those of a model of images, whose positions have three parts: of a text they are the same, and
`mrope_section` says only what belongs to which.
"""

from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, LinearAttention
from qjax.models.families.family import Family, Fields
from qjax.models.families.keys import Keys
from qjax.models.families.scaling import rotary_dim_from_hf
from qjax.models.families.windows import every
from qjax.models.linear_attention import EPS

_PERIOD, _KINDS = 4, ("full_attention", "linear_attention")
_ROWS = {
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_conv_kernel_dim": "width",
}


def linear_from_hf(keys: Keys, layers: int) -> LinearAttention:
    """The rule and its layers, from linear_* and from layer_types or full_attention_interval."""
    types = keys.get("layer_types")
    if types is None:
        full = every(keys.count("full_attention_interval", _PERIOD), layers)
        linear = tuple(i for i in range(layers) if i not in full)
    elif not isinstance(types, list | tuple) or len(types) != layers or any(t not in _KINDS for t in types):
        raise UserError(f"config.json: layer_types = {str(types)[:60]}; expected one of {', '.join(_KINDS)} a layer")
    else:
        linear = tuple(i for i, t in enumerate(types) if t == _KINDS[1])
    sizes = {field: keys.count(key) for key, field in _ROWS.items()}
    return checked(LinearAttention(layers=linear, tiled=True, **sizes), "config.json")


def checked(rule: LinearAttention, where: str) -> LinearAttention:
    """The rule itself, or a UserError where its numbers cannot make one."""
    if rule.value_heads % rule.key_heads:
        raise UserError(f"{where}: {rule.value_heads} value heads are no multiple of {rule.key_heads} key heads")
    if rule.width < 2:
        raise UserError(f"{where}: a convolution of width {rule.width} sees no token before; expected 2 or more")
    return rule


def linear_to_hf(c: DecoderConfig, rule: LinearAttention) -> Fields:
    """The keys that `linear_from_hf` reads."""
    sizes = {key: getattr(rule, field) for key, field in _ROWS.items()}
    return sizes | {"layer_types": [_KINDS[c.is_linear(i)] for i in range(c.layers)]}


def linear_from_gguf(keys: Keys, layers: int) -> LinearAttention:
    """The same from a GGUF file's ssm.* keys."""
    said: Any = keys.get("attention.recurrent_layers")
    if said is None:
        full = every(keys.count("full_attention_interval", _PERIOD), layers)
        said = [i not in full for i in range(layers)]
    if not isinstance(said, list | tuple | np.ndarray) or len(said) < layers:
        raise UserError(f"{keys.where}attention.recurrent_layers = {str(said)[:40]}; expected one boolean a layer")
    heads, inner = keys.count("ssm.time_step_rank"), keys.count("ssm.inner_size")
    if inner % heads:
        raise UserError(f"{keys.where}ssm.inner_size = {inner} is no multiple of {heads} heads")
    rule = LinearAttention(
        layers=tuple(i for i in range(layers) if said[i]), key_heads=keys.count("ssm.group_count"), value_heads=heads,
        key_dim=keys.count("ssm.state_size"), value_dim=inner // heads, width=keys.count("ssm.conv_kernel"), tiled=True,
    )  # fmt: skip
    return checked(rule, "GGUF metadata")


def linear_to_gguf(c: DecoderConfig, rule: LinearAttention) -> Fields:
    """The keys that `linear_from_gguf` reads."""
    if rule.key_dim != rule.value_dim:
        raise UserError(
            f"llama.cpp has one size for keys and values of linear attention, not {rule.key_dim} and {rule.value_dim}"
        )
    if c.norm_eps != EPS:
        raise UserError(f"llama.cpp has one eps for all norms and for q and k of linear attention, which have {EPS}")
    full = tuple(i for i in range(c.layers) if not c.is_linear(i))
    period = full[0] + 1 if full else c.layers + 1
    regular = full == every(period, c.layers)
    recurrent = [c.is_linear(i) for i in range(c.layers)]
    return {
        "ssm.conv_kernel": rule.width,
        "ssm.state_size": rule.key_dim,
        "ssm.group_count": rule.key_heads,
        "ssm.time_step_rank": rule.value_heads,
        "ssm.inner_size": rule.value_heads * rule.value_dim,
    } | ({"full_attention_interval": period} if regular else {"attention.recurrent_layers": recurrent})


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


QWEN3_5 = Family(
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    arch="qwen35",
    traits={"norm_offset": 1.0, "qk_norm": True, "attn_gate": True},
    absent={
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "mrope_section": (11, 11, 10),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    options=frozenset({"partial_rotary_factor", "mtp"}),
    gguf_names={"mlp_norm": "post_attention_norm"},
    from_hf=_from_hf,
    to_hf=_to_hf,
    from_gguf=_from_gguf,
    to_gguf=_to_gguf,
)
