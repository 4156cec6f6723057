"""How config.json and GGUF files say that rotary frequencies are rescaled, or that a part of a head only is rotated.

    config.json   rope_scaling = {"rope_type": "yarn", "factor": 4, ...}
    GGUF          rope.scaling.* keys; llama3, proportional and tables as the tensor rope_freqs.weight, longrope as two

llama.cpp makes what YaRN rotates longer by 1 + 0.1 ln factor on its own; its key `attn_factor` is what comes on top. It
takes longrope's long divisors where its context is opened longer than the original one, transformers (and qjax) where
the text is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.families.keys import Keys, shortest
from qjax.models.rotary import STILL, rope_divisors

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_ORIGINAL = "original_max_position_embeddings"


def scaling_from_hf(
    rope: Mapping[str, Any] | None, key: str, keys: Keys, options: Collection[str]
) -> RopeScaling | None:
    """The scaling that an object of config.json asks for.

    Args:
      rope: the object.
      key: its name, for errors.
      keys: of the whole config.json.
      options: of the family; the kinds among them that not all families have.
    """
    if not rope:
        return None
    kind = rope.get("rope_type", rope.get("type", "default"))
    if "longrope" in options and kind in ("su", "yarn"):  # what Phi-3's first files call it
        kind = "longrope"
    if kind == "default":
        return None
    known = ("linear", "llama3", "yarn", *(kind for kind in ("longrope", "proportional") if kind in options))
    if kind not in known:
        raise UserError(
            f"config.json: {key}.rope_type = {kind!r} is not supported; supported: default, {', '.join(known)}"
        )

    def number(name: str, default: Any = None) -> float:
        value = rope.get(name)
        return keys.positive(f"{key}.{name}", default if value is None else value)

    if kind == "linear":
        return RopeScaling("linear", number("factor"))
    if kind == "proportional":
        return RopeScaling(kind, number("factor", 1.0), part=number("partial_rotary_factor", 1.0))
    context = keys.get("max_position_embeddings") if kind != "llama3" else None
    original = int(number(_ORIGINAL, keys.get(_ORIGINAL, context)))
    if kind == "llama3":
        return RopeScaling(kind, number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
    factor = number("factor", keys.count("max_position_embeddings") / original)
    if kind == "longrope":
        long, short = (_divisors(rope.get(name), f"{key}.{name}") for name in ("long_factor", "short_factor"))
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return RopeScaling(
            kind, factor, original_max_position=original, divisors=long, short_divisors=short,
            attention_factor=number("attention_factor", grown),
        )  # fmt: skip
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise UserError(f"config.json: {key}.truncate = {truncate!r}; expected true or false")
    grown = yarn_growth(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        grown = yarn_growth(factor, number("mscale")) / yarn_growth(factor, number("mscale_all_dim"))
    return RopeScaling(
        kind, factor, original_max_position=original, beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0), attention_factor=number("attention_factor", grown), truncate=truncate,
    )  # fmt: skip


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The object that `scaling_from_hf` reads."""
    s = scaling
    if s is None:
        return None
    if s.kind == "table":
        raise UserError("config.json cannot hold a table of rotary divisors (rope_freqs.weight of a GGUF file)")
    said: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind == "proportional":
        return said | {"partial_rotary_factor": s.part}
    if s.kind == "llama3":
        said |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn" and (s.beta_fast, s.beta_slow) != (32.0, 1.0):
        said |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
    if s.kind == "yarn" and not s.truncate:
        said["truncate"] = False
    if s.kind == "longrope":
        said |= {"long_factor": list(s.divisors), "short_factor": list(s.short_divisors)}
    if s.kind == "longrope" or (s.kind == "yarn" and s.attention_factor != yarn_growth(s.factor)):
        said["attention_factor"] = s.attention_factor
    return said if s.kind == "linear" else said | {_ORIGINAL: s.original_max_position}


def scaling_from_gguf(keys: Keys, dim: int, theta: float, tensors: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling of a GGUF file.

    Args:
      keys: of its metadata.
      dim: how many numbers of a head are rotated.
      theta: the rotary base.
      tensors: those of `FREQS`, `LONG` and `SHORT` that the file has.
    """
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.optional("rope.scaling.factor") or keys.optional("rope.scale_linear") or 1.0
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UserError(
            f"{keys.at}rope.scaling.type = {kind!r} is not supported; supported: none, linear, yarn, longrope"
        )
    found = {name: _table(name, tensors[name], dim) for name in (FREQS, LONG, SHORT) if name in tensors}
    context = keys.count("context_length")
    original = keys.count("rope.scaling.original_context_length", context)
    on_top = keys.number("rope.scaling.attn_factor", 1.0)
    if LONG in found or SHORT in found or kind == "longrope":
        if not {LONG, SHORT} <= found.keys():
            missing = SHORT if LONG in found else LONG
            raise UserError(
                f"tensor {missing!r} is missing: the other half of a longrope scaling, or its type, is there"
            )
        return RopeScaling(
            "longrope", context / original, original_max_position=original, divisors=found[LONG],
            short_divisors=found[SHORT], attention_factor=on_top,
        )  # fmt: skip
    if FREQS in found and factor != 1.0:
        raise UserError(f"{keys.at}rope.scaling.factor = {factor} together with rope_freqs.weight is not supported")
    if kind == "yarn":  # llama.cpp reads no beta_fast and beta_slow of these architectures
        return RopeScaling(
            "yarn", factor, original_max_position=original, attention_factor=on_top * yarn_growth(factor)
        )
    if FREQS not in found:
        return None if factor == 1.0 else RopeScaling("linear", factor)
    still = sum(d >= STILL for d in found[FREQS])
    if still and found[FREQS] == (found[FREQS][0],) * (dim // 2 - still) + found[FREQS][-1:] * still:
        return RopeScaling("proportional", found[FREQS][0], part=1 - still / (dim // 2))
    # All published Llama 3 checkpoints share the other three numbers, so the formula can be recovered and exported.
    llama3 = RopeScaling("llama3", shortest(max(found[FREQS])))
    if np.allclose(rope_divisors(dim, theta, llama3), np.array(found[FREQS], np.float32), rtol=1e-5):
        return llama3
    return RopeScaling("table", divisors=found[FREQS])


def scaling_to_gguf(scaling: RopeScaling | None) -> dict[str, Any]:
    """The keys that `scaling_from_gguf` reads; see also `rope_tensors`."""
    s = scaling
    if s is None or s.kind in ("llama3", "table", "proportional"):
        return {}
    if s.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": s.factor}
    said: dict[str, Any] = {
        "rope.scaling.type": s.kind,
        "rope.scaling.original_context_length": s.original_max_position,
    }
    if s.kind == "longrope":
        return said | {"rope.scaling.attn_factor": s.attention_factor}
    said["rope.scaling.factor"] = s.factor
    if (on_top := s.attention_factor / yarn_growth(s.factor)) != 1.0:
        said["rope.scaling.attn_factor"] = on_top
    if (s.beta_fast, s.beta_slow) != (32.0, 1.0):
        raise UserError(
            f"llama.cpp runs YaRN with beta_fast = 32 and beta_slow = 1 only, got {s.beta_fast:g} and {s.beta_slow:g}"
        )
    return said


def rope_tensors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file that say how rotary frequencies are rescaled, f32[rotated / 2] each."""
    s = config.rope_scaling
    if s is None or s.kind in ("linear", "yarn"):
        return {}
    if s.kind == "longrope":
        return {LONG: np.array(s.divisors, np.float32), SHORT: np.array(s.short_divisors, np.float32)}
    scaled = config.of_layer(config.global_layers[0] if config.global_layers else 0)
    return {FREQS: np.asarray(rope_divisors(scaled.rotated, config.rope_theta, s), np.float32)}


def yarn_growth(factor: float, weight: float = 1.0) -> float:
    """What YaRN makes rotated queries and keys longer by (arXiv:2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_dim_from_hf(keys: Keys, head_dim: int) -> int | None:
    """How many numbers of a head are rotated, by partial_rotary_factor in either place; None: all."""
    spelled = [keys.values.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    inside = next((rope["partial_rotary_factor"] for rope in spelled if "partial_rotary_factor" in rope), None)
    factor = keys.positive(
        "partial_rotary_factor", keys.get("partial_rotary_factor", 1.0) if inside is None else inside
    )
    dim = int(head_dim * factor)
    if factor > 1 or dim < 2 or dim % 2:
        raise UserError(
            f"config.json: partial_rotary_factor = {factor} rotates {dim} of {head_dim} numbers; expected an even part"
        )
    return None if dim == head_dim else dim


def _divisors(value: Any, key: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, int | float) and v > 0 for v in value):
        raise UserError(f"config.json: {key} = {str(value)[:40]}; expected a list of positive numbers")
    return tuple(map(float, value))


def _table(name: str, value: Any, dim: int) -> tuple[float, ...]:
    divisors = np.asarray(value, np.float32).reshape(-1)
    if divisors.shape != (dim // 2,) or not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise UserError(f"{name}: expected {dim // 2} positive numbers, got shape {divisors.shape}")
    return tuple(float(d) for d in divisors)
