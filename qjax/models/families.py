"""Every name and config of the supported model families, in one place to import from.

config_from_hf / config_to_hf        config.json   <-> DecoderConfig
config_from_gguf / config_to_gguf    GGUF metadata <-> DecoderConfig (and `rope_freqs`, its one extra tensor)
weight_names                         flax path, Hugging Face name and GGUF name of every weight
"""

from __future__ import annotations

from qjax.models.config_gguf import config_from_gguf, config_to_gguf, rope_freqs
from qjax.models.config_hf import config_from_hf, config_to_hf
from qjax.models.family_table import FAMILIES
from qjax.models.weight_names import WeightName, weight_names

__all__ = [
    "FAMILIES",
    "WeightName",
    "config_from_gguf",
    "config_from_hf",
    "config_to_gguf",
    "config_to_hf",
    "rope_freqs",
    "weight_names",
]
