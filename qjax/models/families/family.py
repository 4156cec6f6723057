"""One family of decoders: how it differs from Llama, and how its files say so.

    config.json     -> common fields (config_hf)   | family.from_hf(keys, common)   back: family.to_hf(config, hf)
    GGUF metadata   -> common fields (config_gguf) | family.from_gguf(keys, common) back: family.to_gguf(config)

A family's file fills in one record; what it leaves out is Llama's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qjax.models.config import DecoderConfig
from qjax.models.families.keys import Keys

Fields = dict[str, Any]


def _no_fields(*_: Any) -> Fields:
    return {}


def _unchanged(_: DecoderConfig, hf: Fields) -> Fields:
    return hf


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
      name: the Hugging Face model_type.
      architecture: the Hugging Face class.
      arch: llama.cpp's `general.architecture`. Where two families share one, the first in the table is the one without
        windows, and those with experts are known by these.
      traits: the DecoderConfig fields that all its members share.
      absent: what a key missing from config.json means (transformers' own defaults); a string: the value of that key.
      absent_gguf: what a key missing from GGUF metadata means to llama.cpp.
      options: what other families refuse and this one reads: keys of config.json, "longrope", "proportional",
        "experts", or "either" with and without, "latent" attention, "mtp" tensors, which are passed over; of a GGUF
        file "head_count_kv" by layer, and "k_eq_v".
      period: llama.cpp takes every n-th layer to be without window unless the file says otherwise; 0: none.
      pairs: llama.cpp rotates neighbouring rows of q and k where Hugging Face rotates halves: rows are permuted.
      expert_columns: where a folder has gate and up of all experts in one tensor: gate's columns are its even ones
        ("even"), or its first ones ("first"), or its first rows ("rows"); "": a tensor for each expert and part.
      hf_names: part of a layer -> its name below `model.layers.0`, where it is not Llama's (or Qwen's, of experts).
      gguf_names: part of a layer -> its name below `blk.0`, where it is not that of every GGUF file.
      from_hf: (keys of config.json, the common fields) -> the DecoderConfig fields that only this family reads.
      to_hf: (config, contents of a config.json as Llama's) -> as this family's.
      from_gguf: (keys of the metadata, the common fields) -> the DecoderConfig fields that only this family reads.
      to_gguf: (config) -> the keys that only this family writes.
    """

    name: str
    architecture: str
    arch: str
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent_gguf: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: frozenset[str] = frozenset()
    period: int = 0
    pairs: bool = False
    expert_columns: str = ""
    hf_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    from_hf: Callable[[Keys, Fields], Fields] = _no_fields
    to_hf: Callable[[DecoderConfig, Fields], Fields] = _unchanged
    from_gguf: Callable[[Keys, Fields], Fields] = _no_fields
    to_gguf: Callable[[DecoderConfig], Fields] = _no_fields
