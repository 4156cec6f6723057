"""What commands print: tables for people on standard output, JSON with stable keys for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qjax.tables import size as size
from qjax.terminal import shown

if TYPE_CHECKING:
    from rich.console import Console

JSON_HELP = 'write the numbers as JSON ("-": to standard output instead of the table)'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
    """Print a plain table; the columns in `numbers` are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for n, name in enumerate(columns):
        right = n in numbers
        made.add_column(name, justify="right" if right else "left", no_wrap=right or n == 0, overflow="fold")
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    console().print(made)


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Print what is called what, one a line."""
    rows = [(shown(name), shown(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")


def console() -> Console:
    """Standard output; wide where it is a file or a pipe, so that tables keep their columns."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def write_json(path: Path | None, value: Any) -> bool:
    """Write `value` to the file, or to standard output for "-". True when that replaces the printed table."""
    if path is None:
        return False
    from qjax.rundir import plain, write_json

    if str(path) != "-":
        write_json(path, value)
        return False
    print(json.dumps(plain(value), indent=2, allow_nan=False))  # ASCII, whatever the terminal's encoding
    return True
