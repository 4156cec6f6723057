"""Which layers see everything and which only a window, as config.json and GGUF metadata spell it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families.keys import Keys


def every(period: int, layers: int) -> tuple[int, ...]:
    """Every n-th layer, the last of each n; none for 0."""
    return tuple(range(period - 1, layers, period)) if period else ()


def windows_from_hf(keys: Keys, otherwise: Callable[[int], tuple[int, ...]]) -> dict[str, Any]:
    """`window` and `global_layers` from sliding_window and layer_types.

    Args:
      keys: of config.json.
      otherwise: layers -> those that ignore the window, where there are no layer_types.
    """
    layers = keys.count("num_hidden_layers")
    if "sliding_window" in keys.values and keys.values["sliding_window"] is None:
        return {}
    types = keys.values.get("layer_types")
    if not isinstance(types, list | tuple | None):
        raise UserError(f"config.json: layer_types = {types!r}; expected a list")
    if types is None:
        full = otherwise(layers)
    else:
        unknown = {str(t) for t in types} - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            what = f"{sorted(unknown)[0]!r}" if unknown else f"{len(types)} entries for {layers} layers"
            raise UserError(f"config.json: layer_types has {what}; expected full_attention or sliding_attention each")
        full = tuple(i for i, t in enumerate(types) if t == "full_attention")
    return {} if len(full) == layers else {"window": keys.count("sliding_window"), "global_layers": full}


def windows_to_hf(c: DecoderConfig) -> dict[str, Any]:
    """The keys that `windows_from_hf` reads."""
    kinds = ["full_attention" if c.layer_window(i) is None else "sliding_attention" for i in range(c.layers)]
    return {"layer_types": kinds} | ({} if c.window is None else {"sliding_window": c.window})


def windows_from_gguf(keys: Keys, period: int, layers: int) -> dict[str, Any]:
    """`window` and `global_layers` from attention.sliding_window and its pattern, `period` where there is none."""
    key = "attention.sliding_window"
    window = keys.get(key, 0)
    if not isinstance(window, int | np.integer) or window < 0:
        raise UserError(f"{keys.where}{key} = {window!r}; expected a positive integer")
    pattern = keys.get(f"{key}_pattern", period)
    if not window:
        return {}
    if isinstance(pattern, list | tuple | np.ndarray):
        if len(pattern) < layers:
            raise UserError(f"{keys.where}{key}_pattern has {len(pattern)} entries for {layers} layers")
        full = tuple(i for i in range(layers) if not pattern[i])
    elif not isinstance(pattern, int | np.integer) or pattern < 0:
        raise UserError(f"{keys.where}{key}_pattern = {pattern!r}; expected an integer or one boolean a layer")
    else:
        full = every(int(pattern), layers)
    return {} if len(full) == layers else {"window": int(window), "global_layers": full}


def windows_to_gguf(c: DecoderConfig, period: int, absent: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that `windows_from_gguf` reads."""
    keys: dict[str, Any] = {}
    if c.window is not None:
        keys["attention.sliding_window"] = c.window
        if c.global_layers != every(period, c.layers):
            keys["attention.sliding_window_pattern"] = [c.layer_window(i) is not None for i in range(c.layers)]
    elif (
        "attention.sliding_window" in absent
    ):  # a missing one means that, and no window at all only the pattern can say
        keys["attention.sliding_window_pattern"] = [False] * c.layers
    return keys
