"""The supported model families, one file each, and every name and config of theirs in one place to import from.

FAMILIES, family_of                  the table
config_from_hf / config_to_hf        config.json   <-> DecoderConfig
config_from_gguf / config_to_gguf    GGUF metadata <-> DecoderConfig (and `rope_tensors`, which metadata cannot hold)
weight_names                         flax path, Hugging Face name and GGUF name of every weight
"""

from __future__ import annotations

from qjax.models.families.config_gguf import config_from_gguf, config_to_gguf
from qjax.models.families.config_hf import config_from_hf, config_to_hf
from qjax.models.families.scaling import rope_tensors
from qjax.models.families.table import FAMILIES, family_of
from qjax.models.families.weight_names import WeightName, weight_names

__all__ = [
    "FAMILIES",
    "WeightName",
    "config_from_gguf",
    "config_from_hf",
    "config_to_gguf",
    "config_to_hf",
    "family_of",
    "rope_tensors",
    "weight_names",
]
