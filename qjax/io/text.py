"""Text files that people name: for evaluation and calibration."""

from __future__ import annotations

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
