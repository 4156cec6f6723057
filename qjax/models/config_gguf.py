"""GGUF metadata <-> DecoderConfig, with llama.cpp's own defaults and key names.

What metadata does not hold: whether the head is tied (the file then has no `output.weight`) and Llama 3's rotary
scaling, which is the tensor `rope_freqs.weight`. Both are arguments here. The arch `llama` serves Llama and Mistral.
llama.cpp reads a window for the Gemmas only; for other families the key is written all the same, but llama.cpp attends
to everything, so texts longer than the window differ there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.config_hf import check_dimensions, check_equal
from qjax.models.decoder import rope_divisors
from qjax.models.family_table import FAMILIES, family_of

_PERIOD = {"gemma2": 2, "gemma3": 6}  # every n-th layer is global unless the file says otherwise
_WIDE_LAYERS = {"gemma2": 46, "gemma3": 62}  # llama.cpp knows the 27B models, whose query_dim is dim / heads, by these


def config_from_gguf(meta: Mapping[str, Any], *, tied: bool = False, rope_freqs: Any | None = None) -> DecoderConfig:
    """Read the metadata of a GGUF file.

    Args:
      meta: full keys (`llama.block_count`) to Python values; arrays as sequences.
      tied: the file has no tensor `output.weight`.
      rope_freqs: the tensor `rope_freqs.weight`, f32[head_dim / 2], where the file has one.

    Raises:
      UserError: an unknown architecture, a missing or malformed key, or an unsupported option, named with its value.
    """
    arch = meta.get("general.architecture")
    names = {family.arch: name for name, family in FAMILIES.items() if name != "mistral"}
    if not isinstance(arch, str) or arch not in names:
        raise UserError(f"general.architecture = {arch!r} is not supported; supported: {', '.join(sorted(names))}")

    def count(key: str, default: int | None = None) -> int:
        value = _one(f"{arch}.{key}", meta.get(f"{arch}.{key}", default))
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value <= 0:
            what = "is missing" if value is None else f"= {value!r}"
            raise UserError(f"{arch}.{key} {what}; expected a positive integer")
        return int(value)

    def number(key: str, default: float | None = None) -> float | None:
        value = meta.get(f"{arch}.{key}", default)
        if value is None:
            return None
        if not isinstance(value, int | float | np.number) or not value > 0:
            raise UserError(f"{arch}.{key} = {value!r}; expected a positive number")
        return _shortest(value)

    if meta.get(f"{arch}.expert_count"):
        raise UserError(
            f"{arch}.expert_count = {meta[f'{arch}.expert_count']!r}: mixtures of experts are not supported"
        )
    heads, dim, layers = count("attention.head_count"), count("embedding_length"), count("block_count")
    head_dim = count("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := count(key, head_dim)) != head_dim:
            raise UserError(f"{arch}.{key} = {other} differs from the head size {head_dim}, which is not supported")
    eps = number("attention.layer_norm_rms_epsilon")
    if eps is None:
        raise UserError(f"{arch}.attention.layer_norm_rms_epsilon is missing; expected a positive number")
    theta = number("rope.freq_base", 10000.0)
    window, global_layers = _windows(arch, meta, layers)
    gemma = arch in _PERIOD
    wide = gemma and layers == _WIDE_LAYERS[arch]
    local_theta = number("rope.freq_base_swa", 10000.0) if arch == "gemma3" and window is not None else None
    query_dim = float(dim // heads) if wide and dim // heads != head_dim else None
    name = "mistral" if arch == "llama" and window is not None else names[arch]
    tokens = meta.get("tokenizer.ggml.tokens")
    config = DecoderConfig(
        vocab=count("vocab_size", len(tokens) if isinstance(tokens, list | tuple | np.ndarray) else None),
        dim=dim,
        hidden=count("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=count("attention.head_count_kv", heads),
        head_dim=head_dim,
        context=count("context_length"),
        norm_eps=eps,
        rope_theta=theta or 10000.0,
        rope_scaling=_scaling(arch, meta, number, head_dim, theta or 10000.0, rope_freqs),
        tied=tied,
        family=name,
        window=window,
        global_layers=global_layers,
        local_rope_theta=local_theta,
        query_dim=query_dim,
        attn_softcap=number("attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
        logit_softcap=number("final_logit_softcapping", 30.0 if arch == "gemma2" else None) if gemma else None,
        **FAMILIES[name].traits,
    )
    return check_dimensions(config, f"{arch} metadata")


def _one(key: str, value: Any) -> Any:
    """The common value of a per-layer array; a plain value passes through."""
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) == 0 or any(v != value[0] for v in value):
            raise UserError(f"{key} differs between layers, which is not supported")
        return value[0]
    return value


def _shortest(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _windows(arch: str, meta: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[int, ...]]:
    key = f"{arch}.attention.sliding_window"
    window = meta.get(key, 4096 if arch == "gemma2" else 0)
    if not isinstance(window, int | np.integer) or window < 0:
        raise UserError(f"{key} = {window!r}; expected a positive integer")
    pattern = meta.get(f"{arch}.attention.sliding_window_pattern", _PERIOD.get(arch, 0))
    if not window:
        return None, ()
    if isinstance(pattern, list | tuple | np.ndarray):
        if len(pattern) < layers:
            raise UserError(f"{key}_pattern has {len(pattern)} entries for {layers} layers")
        full = tuple(i for i in range(layers) if not pattern[i])
    elif not isinstance(pattern, int | np.integer) or pattern < 0:
        raise UserError(f"{key}_pattern = {pattern!r}; expected an integer or one boolean a layer")
    else:
        full = tuple(range(pattern - 1, layers, pattern)) if pattern else ()
    return (None, ()) if len(full) == layers else (int(window), full)


def _scaling(arch, meta, number, head_dim: int, theta: float, rope_freqs) -> RopeScaling | None:
    kind = meta.get(f"{arch}.rope.scaling.type", "linear")
    factor = number("rope.scaling.factor") or number("rope.scale_linear") or 1.0
    if kind not in ("none", "linear"):
        raise UserError(f"{arch}.rope.scaling.type = {kind!r} is not supported; supported: none, linear")
    if rope_freqs is None:
        return None if factor == 1.0 else RopeScaling("linear", factor)
    divisors = np.asarray(rope_freqs, np.float32).reshape(-1)
    if divisors.shape != (head_dim // 2,) or not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise UserError(f"rope_freqs.weight: expected {head_dim // 2} positive numbers, got shape {divisors.shape}")
    if factor != 1.0:
        raise UserError(f"{arch}.rope.scaling.factor = {factor} together with rope_freqs.weight is not supported")
    # All published Llama 3 checkpoints share the other three numbers, so the formula can be recovered and exported.
    llama3 = RopeScaling("llama3", _shortest(divisors.max()))
    if np.allclose(rope_divisors(head_dim, theta, llama3), divisors, rtol=1e-5):
        return llama3
    return RopeScaling("table", divisors=tuple(float(d) for d in divisors))


def rope_freqs(config: DecoderConfig) -> np.ndarray | None:
    """The tensor `rope_freqs.weight` of a GGUF file, f32[head_dim / 2], or None where the file needs none."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return None
    return np.asarray(rope_divisors(config.head_dim, config.rope_theta, scaling), np.float32)


def config_to_gguf(config: DecoderConfig) -> dict[str, Any]:
    """The architecture's metadata under full keys, with `general.architecture`, without the tokenizer's.

    Write ints as u32, floats as f32, bools as bool. `config_from_gguf` reads back the same record, except that a
    Mistral without a window becomes a Llama.

    Raises:
      UserError: llama.cpp has no way to say something in `config`.
    """
    c = config
    if c.family not in FAMILIES:
        raise UserError(f"family {c.family!r} is unknown; known: {', '.join(FAMILIES)}")
    arch = family_of(c).arch
    if arch == "qwen2" and c.heads * c.head_dim != c.dim:
        raise UserError(
            f"llama.cpp's qwen2 wants heads x head_dim = embedding_length, got {c.heads} x {c.head_dim} and {c.dim}"
        )
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
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
    }
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": c.rope_scaling.factor}
    if c.window is not None:
        keys["attention.sliding_window"] = c.window
        period = _PERIOD.get(arch)
        if c.global_layers != (tuple(range(period - 1, c.layers, period)) if period else ()):
            keys["attention.sliding_window_pattern"] = [c.layer_window(i) is not None for i in range(c.layers)]
    elif arch == "gemma2":  # absent means 4096 there, and no window at all cannot be said but by the pattern
        keys["attention.sliding_window_pattern"] = [False] * c.layers
    if c.local_rope_theta is not None:
        keys["rope.freq_base_swa"] = c.local_rope_theta
    if c.attn_softcap is not None:
        keys["attn_logit_softcapping"] = c.attn_softcap
    if c.logit_softcap is not None:
        keys["final_logit_softcapping"] = c.logit_softcap
    meta = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()}
    back = config_from_gguf(meta, tied=c.tied, rope_freqs=rope_freqs(c))
    # The scaling formula and the family's name are not in the file; what they compute is.
    back = dataclasses.replace(back, rope_scaling=c.rope_scaling, family=c.family)
    check_equal(_as_float32(c), back, f"a GGUF file of architecture {arch!r}")
    return meta


def _as_float32(config: DecoderConfig) -> DecoderConfig:
    """The config with its floats as a file of float32 gives them back."""
    rounded: dict[str, Any] = {
        f.name: _shortest(value)
        for f in dataclasses.fields(config)
        if isinstance(value := getattr(config, f.name), float)
    }
    return dataclasses.replace(config, **rounded)
