"""Many results as one document: an HTML page that stands alone, Markdown, or LaTeX."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from qjax.html_page import standalone
from qjax.report.figure import svg
from qjax.report.pareto import MEASURES, points
from qjax.report.schema import Result, Run
from qjax.report.tables import escape_latex, escape_markdown, html_table, latex, markdown


def page(results: Sequence[Result], title: str = "Results") -> str:
    """One self-contained HTML page: nothing is fetched, a click on a head sorts, dark where the reader's screen is.

    Args:
      results: in the order shown.
      title: heading and window title.
    """
    links = "".join(f'<li><a href="#r{n}">{_e(r.title)}</a></li>' for n, r in enumerate(results))
    body = [f"<h1>{_e(title)}</h1>", f"<nav><ul>{links}</ul></nav>" if len(results) > 1 else ""]
    body += [_section(result, n) for n, result in enumerate(results)]
    return standalone(title, "\n".join(filter(None, body)), _FIGURES)


def markdown_page(results: Sequence[Result]) -> str:
    """A heading, facts and tables for each result."""
    parts = []
    for result in results:
        parts += [
            f"## {escape_markdown(result.title)}",
            _fenced(result.command),
            escape_markdown(_where(result.run)),
        ]
        parts += [escape_markdown(result.note)] if result.note else []
        for table in result.tables:
            parts += [f"### {escape_markdown(table.name)}", markdown(table).rstrip()]
    return "\n\n".join(parts) + "\n"


def latex_page(results: Sequence[Result]) -> str:
    """Tables to be \\input, each below a comment that says which it is."""
    parts = []
    for result in results:
        for table in result.tables:
            said = " ".join(f"{result.title}: {table.name}; {result.command}".split())
            parts.append(f"% {escape_latex(said)}\n{latex(table)}")
    return "\n".join(parts)


def _section(result: Result, number: int) -> str:
    parts = [f'<section id="r{number}"><h2>{_e(result.title)}</h2>', f"<pre>{_e(result.command)}</pre>"]
    parts += [f"<p class=note>{_e(_where(result.run))}</p>"]
    parts += [f"<p>{_e(result.note)}</p>"] if result.note else []
    parts += figures(result)
    for place, table in enumerate(result.tables):  # the first is what a result says; the others are its evidence
        block = f"<div class=wide>{html_table(table)}</div>"
        count = f"{len(table.rows)} row{'s' * (len(table.rows) != 1)}"
        opened = " open" if place == 0 or len(table.rows) <= 12 else ""
        parts.append(f"<details{opened}><summary>{_e(table.name)} <small>{count}</small></summary>{block}</details>")
    return "\n".join(parts) + "</section>"


def figures(result: Result) -> list[str]:
    """A figure per measure, of the first table that has enough points: the tables after it hold its single runs."""
    made = []
    for measure in MEASURES:
        drawn = (svg(points([table], measure), measure) for table in result.tables)
        made += [next(filter(None, drawn), "")]
    return list(filter(None, made))


def _where(run: Run) -> str:
    """The facts of a run in a line; what was not recorded is said."""
    changed = {True: " with changes", False: "", None: ", unknown whether changed"}[run.changed]
    parts = [f"commit {run.commit}{changed}" if run.commit else "commit not recorded"]
    for name in ("machine", "device", "seeds", "versions"):
        found: Any = getattr(run, name)
        if found:
            parts.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in found.items()))
    return "; ".join(parts) + "."


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _e(text: str) -> str:
    return html.escape(text)


_FIGURES = """
svg { display: block; width: 100%; min-width: 700px; max-width: 900px; font: 11px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .tick { text-anchor: middle; fill: var(--dim); } svg .side { text-anchor: end; }
svg .axis { text-anchor: middle; font-size: 13px; }
svg .name { fill: var(--dim); paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
svg .name.best { fill: var(--text); }
svg .frame { fill: none; stroke: var(--line); } svg .grid { stroke: var(--line); stroke-width: .5; }
svg .front { fill: none; stroke: var(--best); stroke-dasharray: 4 3; }
svg .leader { stroke: var(--dim); stroke-width: .6; }
svg circle.best { fill: var(--best); } svg circle.other { fill: var(--other); } svg .whisker { stroke: var(--dim); }
"""
