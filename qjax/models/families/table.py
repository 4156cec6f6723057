"""The table of families: a new one is its file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qjax.models.config import DecoderConfig
from qjax.models.families.family import Family
from qjax.models.families.gemma import GEMMA2, GEMMA3
from qjax.models.families.llama import LLAMA
from qjax.models.families.mistral import MISTRAL
from qjax.models.families.qwen import QWEN2, QWEN3

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)}
)


def family_of(config: DecoderConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.family]
