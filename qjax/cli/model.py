"""What several commands share: opening a MODEL argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qjax.errors import UserError

if TYPE_CHECKING:
    from qjax.pipeline.source import Source

MODEL_HELP = 'Hugging Face directory, .gguf, llama2.c .bin, "reference" or "smollm2"'


def open_with_tokenizer(model: str) -> Source:
    """Open a MODEL argument for a command that reads text; its weights are read when they are asked for.

    Raises:
      UserError: the model cannot be read, or came without a tokenizer.
    """
    from qjax.pipeline.source import open_source

    opened = open_source(model)
    if opened.tokenizer is None:
        raise UserError(f"{model}: has no tokenizer; put its tokenizer.json (or tokenizer.model) beside the weights")
    return opened
