"""What several commands share: loading a MODEL argument."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qjax.errors import UserError

if TYPE_CHECKING:
    from qjax.models.model import Model

MODEL_HELP = 'Hugging Face directory, .gguf, llama2.c .bin, "reference" or "smollm2"'


def load_with_tokenizer(model: str) -> Model:
    """Load a MODEL argument for a command that reads text.

    Raises:
      UserError: the model cannot be read, or came without a tokenizer.
    """
    from qjax.io.checkpoint import load, locate

    loaded = load(locate(model))
    if loaded.tokenizer is None:
        raise UserError(f"{model}: has no tokenizer; put its tokenizer.json (or tokenizer.model) beside the weights")
    return loaded
