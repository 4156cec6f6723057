"""Text files that people name: for evaluation and calibration."""

from __future__ import annotations

import json
from collections.abc import Iterable
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


def texts_at(paths: Iterable[str | Path]) -> list[str]:
    """The texts of files and folders; a folder stands for the .txt, .md and .json files in it, in the order of names.

    Raises:
      UserError: as `read_texts`, or a folder without such a file.
    """
    texts: list[str] = []
    for path in map(Path, paths):
        files = sorted(f for f in path.rglob("*") if f.suffix in _TEXTS) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: the folder holds no {', '.join(_TEXTS)} file")
        texts += [text for file in files for text in read_texts(file)]
    return texts


_TEXTS = (".txt", ".md", ".json")
