"""What several commands share: loading a MODEL argument, reading a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qjax.errors import UserError

if TYPE_CHECKING:
    from qjax.models.model import Model

MODEL_HELP = 'Hugging Face directory, .gguf, llama2.c .bin, or "reference"'


def load_with_tokenizer(model: str) -> Model:
    """Load a MODEL argument for a command that reads text.

    Raises:
      UserError: the model cannot be read, or came without a tokenizer.
    """
    from qjax.io.checkpoint import load

    loaded = load(model)
    if loaded.tokenizer is None:
        raise UserError(f"{model}: has no tokenizer; put its tokenizer.json (or tokenizer.model) beside the weights")
    return loaded


def read_text(path: Path, option: str) -> str:
    """A text file as UTF-8; undecodable or empty text is a UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{option} {path}: byte {error.start} is not UTF-8 text") from None
    if not text.strip():
        raise UserError(f"{option} {path}: the file is empty")
    return text
