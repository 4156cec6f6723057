"""GGUF metadata <-> DecoderConfig, with llama.cpp's own defaults and key names; what one family has is its own file's.

What metadata does not hold: whether the head is tied (the file then has no `output.weight`), whether q, k and v have
biases or norms, whether keys are values, and rotary scaling that is a tensor. All are arguments here. The arch `llama`
serves Llama, Mistral and Mixtral, `olmo2` both OLMo 2 and 3. llama.cpp reads a window for the Gemmas and OLMo 3 only;
for other families the key is written all the same, but llama.cpp attends to everything, so texts longer than the window
differ there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.config_hf import check_dimensions, check_equal, known_family
from qjax.models.families.family import Family
from qjax.models.families.keys import Keys, shortest
from qjax.models.families.scaling import FREQS, rope_tensors, scaling_from_gguf, scaling_to_gguf
from qjax.models.families.table import FAMILIES
from qjax.models.families.windows import windows_from_gguf, windows_to_gguf


def config_from_gguf(
    meta: Mapping[str, Any],
    *,
    tied: bool = False,
    biased: bool = False,
    normed: bool = False,
    k_eq_v: bool = False,
    rope_freqs: Any | None = None,
    rope: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """Read the metadata of a GGUF file.

    Args:
      meta: full keys (`llama.block_count`) to Python values; arrays as sequences.
      tied: the file has no tensor `output.weight`.
      biased: the file has biases of q, k and v; asked for by families that may have them.
      normed: the same of norms of q and k.
      k_eq_v: the same of layers without a tensor for values.
      rope_freqs: the tensor `rope_freqs.weight`, f32[head_dim / 2], where the file has one.
      rope: all tensors of that kind by name, where there are others (`rope_tensors`).

    Raises:
      UserError: an unknown architecture, a missing or malformed key, or an unsupported option, named with its value.
    """
    arch = meta.get("general.architecture")
    archs = sorted({family.arch for family in FAMILIES.values()})
    if not isinstance(arch, str) or arch not in archs:
        raise UserError(f"general.architecture = {arch!r} is not supported; supported: {', '.join(archs)}")
    at = f"{arch}."
    count = meta.get(f"{at}expert_count", 0)
    families = [f for f in FAMILIES.values() if f.arch == arch and bool(count) in _experts(f)]
    if not families:
        raise UserError(f"{at}expert_count = {count!r} is not supported; expected {'some' if not count else 'none'}")
    keys = Keys(meta, families[0].absent_gguf, at, at, "float32")
    heads, dim, blocks = (keys.count(k) for k in ("attention.head_count", "embedding_length", "block_count"))
    further = keys.get("nextn_predict_layers", 0)  # the last ones guess further tokens
    if type(further) is not int or not 0 <= further < blocks:
        raise UserError(f"{at}nextn_predict_layers = {further!r}; expected fewer than the {blocks} blocks there are")
    layers = blocks - further
    head_dim = keys.count("attention.key_length", dim // heads)
    rotated = keys.count("rope.dimension_count", head_dim)
    latent = any("latent" in family.options for family in families)
    partial = latent or any("partial_rotary_factor" in family.options for family in families)
    for key, other in (
        ("attention.value_length", head_dim if latent else keys.count("attention.value_length", head_dim)),
        ("rope.dimension_count", head_dim if partial and rotated < head_dim else rotated),
    ):
        if other != head_dim:
            raise UserError(f"{at}{key} = {other} differs from the head size {head_dim}, which is not supported")
    tensors = dict(rope or {}) | ({} if rope_freqs is None else {FREQS: rope_freqs})
    theta = keys.number("rope.freq_base", 10000.0)
    tokens = meta.get("tokenizer.ggml.tokens")
    windows = windows_from_gguf(keys, families[0].period, layers)
    family = families[-1 if windows else 0]
    common: dict[str, Any] = {
        "vocab": keys.count("vocab_size", len(tokens) if isinstance(tokens, list | tuple | np.ndarray) else None),
        "dim": dim,
        "hidden": keys.count("feed_forward_length"),
        "layers": layers,
        "heads": heads,
        "kv_heads": heads if "head_count_kv" in family.options else keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "context": keys.count("context_length"),
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": scaling_from_gguf(keys, rotated, theta, tensors),
        "rotary_dim": None if rotated == head_dim else rotated,
        "qkv_bias": biased and "attention_bias" in family.options,
        "k_eq_v": k_eq_v and "k_eq_v" in family.options,
        "qk_norm": normed and "use_qk_norm" in family.options,
        "tied": tied,
        "family": family.name,
        **windows,
    }
    config = DecoderConfig(**common | dict(family.traits) | family.from_gguf(keys, common))
    return check_dimensions(config, f"{arch} metadata")


def _experts(family: Family) -> tuple[bool, ...]:
    """Whether its members have experts, do not, or either."""
    return (False, True) if "either" in family.options else ("experts" in family.options,)


def config_to_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The architecture's metadata under full keys, with `general.architecture`, without the tokenizer's.

    Write ints as u32, floats as f32, bools as bool. `config_from_gguf` reads back the same record, except that a
    Mistral without a window becomes a Llama.

    Raises:
      UserError: llama.cpp has no way to say something in `config`.
    """
    c = config
    family = known_family(c)
    own = family.to_gguf(c)
    keys: dict[str, Any] = {
        "vocab_size": c.vocab,
        "context_length": c.context,
        "embedding_length": c.dim,
        "block_count": c.layers,
        "feed_forward_length": c.hidden,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.dimension_count": c.rotated,
        "rope.freq_base": c.rope_theta,
    }
    keys |= scaling_to_gguf(c.rope_scaling)
    keys |= windows_to_gguf(c, family.period, family.absent_gguf) | own
    meta = {"general.architecture": family.arch} | {f"{family.arch}.{key}": value for key, value in keys.items()}
    said = {"tied": c.tied, "biased": c.qkv_bias, "normed": c.qk_norm, "k_eq_v": c.k_eq_v}
    back = config_from_gguf(meta, **said, rope=rope_tensors(c))
    # The scaling formula and the family's name are not in the file; what they compute is.
    back = dataclasses.replace(back, rope_scaling=c.rope_scaling, family=c.family)
    check_equal(_as_float32(c), back, f"a GGUF file of architecture {family.arch!r}")
    return meta


def _as_float32(config: DecoderConfig) -> DecoderConfig:
    """The config with its floats as a file of float32 gives them back."""
    rounded: dict[str, Any] = {
        f.name: shortest(value)
        for f in dataclasses.fields(config)
        if isinstance(value := getattr(config, f.name), float)
    }
    return dataclasses.replace(config, **rounded)
