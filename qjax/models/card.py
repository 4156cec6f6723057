"""What a model's files say of it beside architecture, weights and tokenizer; saving writes it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Card:
    """What a file or folder said; all empty for a model made here.

    Attributes:
      gguf: metadata of a GGUF file that neither architecture nor tokenizer hold, in the file's own types: name,
        license, tags, size label, the EOT id ...
      generation: contents of generation_config.json: how the model wants to be sampled.
      stops: all ids that end a text, where there are more than the tokenizer's EOS.
      dtype: of a folder's weights, as numpy spells it.
    """

    gguf: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stops: tuple[int, ...] = ()
    dtype: str | None = None


def stops_of(tokenizer: Tokenizer | None, card: Card) -> tuple[int, ...]:
    """The ids that end a text: the tokenizer's EOS, then what the files say."""
    eos = None if tokenizer is None else tokenizer.eos
    return tuple(dict.fromkeys(([] if eos is None else [eos]) + list(card.stops)))
