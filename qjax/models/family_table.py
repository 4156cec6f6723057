"""The model families: how each differs from Llama, and its names at Hugging Face and in llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from qjax.models.config import DecoderConfig

_GEMMA = {"activation": "gelu_tanh", "norm_offset": 1.0, "post_norms": True, "embed_scale": True}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
      architecture: the Hugging Face class.
      arch: llama.cpp's `general.architecture`.
      traits: the DecoderConfig fields that all its members share.
      absent: what a key missing from config.json means (transformers' own defaults).
    """

    architecture: str
    arch: str
    traits: Mapping[str, Any]
    absent: Mapping[str, Any]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("LlamaForCausalLM", "llama", {}, {"max_position_embeddings": 2048}),
        "mistral": Family(
            "MistralForCausalLM", "llama", {}, {"max_position_embeddings": 131072, "sliding_window": 4096}
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM", "qwen2", {"qkv_bias": True}, {"max_position_embeddings": 32768, "sliding_window": 4096}
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            "qwen3",
            {"qk_norm": True},
            {"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128},
        ),
        "gemma2": Family(
            "Gemma2ForCausalLM",
            "gemma2",
            _GEMMA,
            {
                "max_position_embeddings": 8192,
                "sliding_window": 4096,
                "sliding_window_pattern": 2,
                "head_dim": 256,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "tie_word_embeddings": True,
            },
        ),
        "gemma3_text": Family(
            "Gemma3ForCausalLM",
            "gemma3",
            _GEMMA | {"qk_norm": True},
            {
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
                "head_dim": 256,
                "query_pre_attn_scalar": 256,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "tie_word_embeddings": True,
            },
        ),
    }
)


def family_of(config: DecoderConfig) -> Family:
    """The family of a config."""
    return FAMILIES[config.family]
