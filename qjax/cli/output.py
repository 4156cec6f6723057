"""What commands print: tables for people on standard output, JSON with stable keys for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

JSON_HELP = 'write the numbers as JSON ("-": to standard output instead of the table)'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = (), title: str = "") -> None:
    """Print a plain table; the columns in `numbers` are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for n, name in enumerate(columns):
        right = n in numbers
        made.add_column(name, justify="right" if right else "left", no_wrap=right or n == 0, overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    console().print(made)


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Print what is called what, one a line."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def console() -> Console:
    """Standard output; wide where it is a file or a pipe, so that tables keep their columns."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error with rate and time left; yields a function (item, bytes done, of all)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    shown = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), TextColumn("{task.fields[item]}"), console=shown, transient=True
    ) as bar:
        task = bar.add_task(what, total=None, item="")
        yield lambda item, done, total: bar.update(task, completed=done, total=total, item=item)


def write_json(path: Path | None, value: Any) -> bool:
    """Write `value` to the file, or to standard output for "-". True when that replaces the printed table."""
    if path is None:
        return False
    from qjax.rundir import plain, write_json

    if str(path) != "-":
        write_json(path, value)
        return False
    json.dump(plain(value), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()
    return True


def size(count: float) -> str:
    """Bytes for people: 1.5 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
