"""The language model inside a model of text and images: its settings and tensors under the names it has alone.

    config.json   {"model_type": "gemma3", "text_config": {...}, "vision_config": {...}}
    tensors       language_model.model.layers.0 ...  ->  model.layers.0 ...      vision_tower ...: left out

What is read is the model of a text without images; saving writes that model alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.io.safetensors import Checkpoint

# model_type of the whole -> of its language model
TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "llama4": "llama4_text",
}
_NAMES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_OTHERS = (
    *("vision_tower.", "vision_model.", "multi_modal_projector."),
    *("audio_tower.", "embed_vision.", "embed_audio.", "visual."),
)


def language_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The contents of a config.json as the language model alone has them."""
    inner = settings.get("text_config")
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_MODELS or not isinstance(inner, Mapping):
        return settings
    outer = {key: settings[key] for key in ("eos_token_id",) if key in settings}
    return {"model_type": TEXT_MODELS[kind]} | outer | dict(inner)


def language_tensors(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint's tensors of the language model, under the names it has alone."""
    found = {}
    for name, stored in checkpoint.tensors.items():
        if name.removeprefix("model.").startswith(_OTHERS):
            continue
        inside = next((new + name.removeprefix(old) for old, new in _NAMES if name.startswith(old)), name)
        found[inside] = stored
    return dataclasses.replace(checkpoint, tensors=found)
