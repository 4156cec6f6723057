"""Text files that people name: for evaluation and calibration."""

from __future__ import annotations

import json
from pathlib import Path

from qjax.errors import UserError


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
      UserError: no such file, not UTF-8, or nothing in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: there is no text in it")
    return text


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: a .json file holds a list of them, any other is one.

    Raises:
      UserError: as `read_text`, or JSON that is no list of texts.
    """
    text = read_text(path)
    if Path(path).suffix != ".json":
        return [text]
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged JSON ({error})") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f'{path}: expected a list of texts, as in ["One.", "Another."]')
    return texts
