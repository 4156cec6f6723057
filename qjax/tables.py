"""Small tables as text and as HTML, for what prints itself in a terminal and in a notebook."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence
from typing import Any


def text_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[int] = ()) -> str:
    """Aligned columns under their heads; those in `numbers` are aligned right.

    >>> print(text_table(("format", "bits"), [("Q4_K", 4.5), ("F32", 32)], numbers=(1,)))
    format  bits
    Q4_K     4.5
    F32       32
    """
    lines = [[str(cell) for cell in line] for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if n in numbers else cell.ljust(w)
            for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[int] = ()) -> str:
    """The same for a notebook's `_repr_html_`, under a title; everything is escaped."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        sides = ["right" if n in numbers else "left" for n in range(len(cells))]
        made = (
            f'<{tag} style="text-align:{side}">{html.escape(str(cell))}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div>{html.escape(title)}</div><table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table>"


def size(count: int | float) -> str:
    """Bytes for people: 1.50 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(count: int | float) -> str:
    """Counts for people: 7.34 M (powers of 1000)."""
    if count < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M", "G"):
        count /= 1000
        if count < 1000:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} T"
