"""What a Hugging Face folder says beside its weights: config.json, generation_config.json and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from qjax.io.tokenizer_hf import write_tokenizer
from qjax.models.card import Card
from qjax.models.config import DecoderConfig
from qjax.models.families import config_to_hf
from qjax.tokenizer import Tokenizer


@runtime_checkable
class Known(Protocol):
    """A model, or one that is only opened."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def card(self) -> Card: ...

    @property
    def stops(self) -> tuple[int, ...]: ...


def write_facts(out: Path, model: Known, dtype: str, further: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Write them into a folder that nobody reads yet.

    Args:
      out: the folder.
      model: whose facts.
      dtype: of the floats: "float32", "bfloat16" or "float16".
      further: of config.json, as what it says of packed weights.
    """
    special: dict[str, Any] = {}
    if model.tokenizer is not None:
        special = {"bos_token_id": model.tokenizer.bos, "eos_token_id": model.tokenizer.eos}
    if len(model.stops) > 1:
        special["eos_token_id"] = list(model.stops)
    special = {key: value for key, value in special.items() if value is not None}
    config = config_to_hf(model.config) | {"torch_dtype": dtype} | special | dict(further)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(
        json.dumps((dict(model.card.generation) or {"_from_model_config": True}) | special, indent=2) + "\n"
    )
    if model.tokenizer is not None:
        write_tokenizer(out, model.tokenizer)
