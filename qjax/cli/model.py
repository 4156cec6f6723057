"""What several commands share: loading a MODEL argument, reading a text, a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def progress_bar(what: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error with rate and time left; yields a function (done, total).

    The first call may come late (after a compilation), so the rate is that of the work itself.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, rate="")

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            speed = bar.tasks[task].speed
            bar.update(task, rate=f"{speed:.3g} {unit}/s" if speed else "")

        yield advance
