"""The table of families: a new one is its file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qjax.models.config import DecoderConfig
from qjax.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from qjax.models.families.family import Family
from qjax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from qjax.models.families.gemma4 import GEMMA4
from qjax.models.families.glm4 import GLM4
from qjax.models.families.glm4_moe import GLM4_MOE
from qjax.models.families.gpt_oss import GPT_OSS
from qjax.models.families.granite import GRANITE
from qjax.models.families.llama import LLAMA
from qjax.models.families.llama4 import LLAMA4
from qjax.models.families.mistral import MISTRAL
from qjax.models.families.mixtral import MIXTRAL
from qjax.models.families.olmo import OLMO2, OLMO3
from qjax.models.families.phi3 import PHI3
from qjax.models.families.qwen import QWEN2, QWEN3
from qjax.models.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from qjax.models.families.qwen3_next import QWEN3_NEXT
from qjax.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from qjax.models.families.smollm3 import SMOLLM3

_ALL = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, GEMMA4, OLMO2, OLMO3, SMOLLM3, GRANITE, PHI3, GLM4, QWEN3_5),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE, GPT_OSS, LLAMA4, QWEN3_5_MOE, QWEN3_NEXT),
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ALL})


def family_of(config: DecoderConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.family]
