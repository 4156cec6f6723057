"""How config.json and GGUF metadata say which layers have linear attention, and of what size."""

from __future__ import annotations

from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, LinearAttention
from qjax.models.families.keys import Keys
from qjax.models.families.windows import every
from qjax.models.linear_attention import EPS

_PERIOD, _KINDS = 4, ("full_attention", "linear_attention")
_SIZES = {
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "linear_num_key_heads": "key_heads",
    "linear_num_value_heads": "value_heads",
    "linear_conv_kernel_dim": "width",
}
LINEAR_ABSENT = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_conv_kernel_dim": 4,
}
"""What keys missing from config.json mean."""


def linear_from_hf(keys: Keys, layers: int, tiled: bool = True) -> LinearAttention:
    """The rule and its layers, from linear_* and from layer_types or full_attention_interval."""
    if keys.get("attn_output_gate", True) is not True:
        raise UserError("config.json: attn_output_gate = False is not supported beside linear attention")
    types = keys.get("layer_types")
    if types is None:
        full = every(keys.count("full_attention_interval", _PERIOD), layers)
        linear = tuple(i for i in range(layers) if i not in full)
    elif not isinstance(types, list | tuple) or len(types) != layers or any(t not in _KINDS for t in types):
        raise UserError(f"config.json: layer_types = {str(types)[:60]}; expected one of {', '.join(_KINDS)} a layer")
    else:
        linear = tuple(i for i, t in enumerate(types) if t == _KINDS[1])
    sizes = {field: keys.count(key) for key, field in _SIZES.items()}
    return checked(LinearAttention(layers=linear, tiled=tiled, **sizes), "config.json")


def checked(rule: LinearAttention, where: str) -> LinearAttention:
    """The rule itself, or a UserError where its numbers cannot make one."""
    if rule.value_heads % rule.key_heads:
        raise UserError(f"{where}: {rule.value_heads} value heads are no multiple of {rule.key_heads} key heads")
    if (most := max(rule.channels, rule.width)) >= 1 << 22:  # before anything counts to it
        raise UserError(f"{where}: linear attention over {most} channels or tokens is more than any model has")
    if rule.width < 2:
        raise UserError(f"{where}: a convolution of width {rule.width} sees no token before; expected 2 or more")
    return rule


def linear_to_hf(c: DecoderConfig, rule: LinearAttention) -> Fields:
    """The keys that `linear_from_hf` reads."""
    sizes = {key: getattr(rule, field) for key, field in _SIZES.items()}
    return sizes | {"layer_types": [_KINDS[c.is_linear(i)] for i in range(c.layers)]}


def linear_from_gguf(keys: Keys, layers: int, tiled: bool = True) -> LinearAttention:
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
        key_dim=keys.count("ssm.state_size"), value_dim=inner // heads, width=keys.count("ssm.conv_kernel"),
        tiled=tiled,
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
