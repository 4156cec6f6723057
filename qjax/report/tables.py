"""A result's table as Markdown, LaTeX (booktabs) and HTML: numbers by their digits, ± intervals, units in the heads."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping

from qjax.report.schema import Cell, Column, Table

MISSING = "\N{EN DASH}"
PLUS_MINUS = " ± "


def head(column: Column) -> str:
    """A column's title, its unit, and what ± stands for: "KL, nats (± s.e.)"."""
    behind = "" if column.interval is None else " (± s.e.)" if re.search("_se(_|$)", column.interval) else " (± 95 %)"
    return column.title + (f", {column.unit}" if column.unit not in ("", column.title) else "") + behind


def cell(row: Mapping[str, Cell], column: Column) -> str:
    """What a cell shows: text, yes or no, a number with its interval, an en dash for what is missing."""
    value = row.get(column.key)
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) or column.digits is None:
        return str(value)
    half = row.get(column.interval) if column.interval else None
    if not isinstance(half, int | float):
        return number(value, column.digits)
    near, close = (f"{v:.{column.digits}f}" for v in (value, half))
    shown = (near, close) if float(close) else (number(value, column.digits), number(half, column.digits))
    return PLUS_MINUS.join(shown)


def number(value: int | float, digits: int) -> str:
    """Fixed digits, unless they would leave nothing of it, or less than two figures of one with many digits.

    >>> number(0.25, 3), number(-0.0001, 3), number(7, 0)
    ('0.250', '-1.0e-04', '7')
    """
    least = 10.0**-digits / 2 if digits < 4 else 10.0 ** (1 - digits)
    wide = digits > 0 and abs(value) >= 1e7
    return f"{value:.1e}" if 0 < abs(value) < least or wide else f"{value:.{digits}f}"


def markdown(table: Table) -> str:
    """A GitHub table; numbers are aligned right."""
    sides = " | ".join("---" if c.digits is None else "--:" for c in table.columns)
    heads = " | ".join(escape_markdown(head(c)) for c in table.columns)
    rows = (" | ".join(escape_markdown(cell(row, c)) for c in table.columns) for row in table.rows)
    return "\n".join(f"| {line} |" for line in (heads, sides, *rows)) + "\n"


def latex(table: Table) -> str:
    """A booktabs tabular; the document needs \\usepackage{booktabs}."""
    sides = "".join("l" if c.digits is None else "r" for c in table.columns)
    heads = " & ".join(escape_latex(head(c)) for c in table.columns)
    rows = (" & ".join(_latex_cell(row, c) for c in table.columns) + r" \\" for row in table.rows)
    begin, end = rf"\begin{{tabular}}{{{sides}}}", r"\end{tabular}"
    return "\n".join((begin, r"\toprule", rf"{heads} \\", r"\midrule", *rows, r"\bottomrule", end)) + "\n"


def coordinates(table: Table) -> str:
    """Coordinates for pgfplots, a row a point: the first column is x, the second y with what stands behind its ±."""
    x, y = table.columns

    def point(row: Mapping[str, Cell]) -> str:
        half = row.get(y.interval) if y.interval else None
        bar = f" +- (0,{half:.4g})" if isinstance(half, int | float) else ""
        return f"({row[x.key]:.4g},{row[y.key]:.4g}){bar}"

    return "\n".join(map(point, table.rows)) + "\n"


def html_table(table: Table) -> str:
    """A table whose heads are buttons that sort, by the values in `data-key`, with the page's script."""
    heads = "".join(f"<th{_side(c)}><button>{html.escape(head(c))}</button></th>" for c in table.columns)
    rows = (
        "".join(
            f'<td{_side(c)} data-key="{html.escape(_key(row.get(c.key)))}">{html.escape(cell(row, c))}</td>'
            for c in table.columns
        )
        for row in table.rows
    )
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table>"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, within a table too."""
    return re.sub(r"([\\`*_\[\]<>|&~#])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", MISSING: "--", "±": r"$\pm$", "Δ": r"$\Delta$", **{c: "\\" + c for c in "&%$#_{}"},
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


def latex_number(text: str) -> str:
    """What `cell` shows of a number, in math mode.

    >>> latex_number("0.25 ± 0.01"), latex_number("2.0e-05")
    ('$0.25 \\\\pm 0.01$', '$2.0 \\\\times 10^{-5}$')
    """
    power: Callable[[re.Match[str]], str] = lambda m: rf" \times 10^{{{int(m[1])}}}"  # noqa: E731
    return "$" + re.sub(r"e([+-]\d+)", power, text).replace("±", r"\pm") + "$"


def _latex_cell(row: Mapping[str, Cell], column: Column) -> str:
    text = cell(row, column)
    return escape_latex(text) if column.digits is None or text == MISSING else latex_number(text)


def _side(column: Column) -> str:
    return " class=text" if column.digits is None else ""


def _key(value: Cell) -> str:
    return "" if value is None else str(value)
