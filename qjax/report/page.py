"""Many results as one document: an HTML page that stands alone, Markdown, or LaTeX."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from qjax.html_page import standalone
from qjax.report.figures.drawing import BOTH, SLIM, STYLE, WIDE, on_page
from qjax.report.figures.kinds import figures, one_figure
from qjax.report.schema import Result, Run
from qjax.report.tables import escape_latex, escape_markdown, html_table, latex, markdown


def page(results: Sequence[Result], title: str = "Results", figure: str = "", end: str = "") -> str:
    """One self-contained HTML page: nothing is fetched, a click on a head sorts, dark where the reader's screen is.

    Args:
      results: in the order shown.
      title: heading and window title.
      figure: a kind that is drawn once of all results and stands first; "": none.
      end: HTML behind the results.
    """
    links = "".join(f'<li><a href="#r{n}">{_e(r.title)}</a></li>' for n, r in enumerate(results))
    body = [f"<h1>{_e(title)}</h1>"]
    body += [on_page(one_figure(results, figure, width)) for width in (WIDE, SLIM) if figure]
    body += [f"<nav><ul>{links}</ul></nav>" if len(results) > 1 else ""]
    for n, result in enumerate(results):
        head = f"<h2>{_e(result.title)}</h2>" if len(results) > 1 else ""
        body.append(f'<section id="r{n}">{head}{_section(result)}</section>')
    return standalone(title, "\n".join([*filter(None, body), end]), STYLE + BOTH)


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


def _section(result: Result) -> str:
    parts = [f"<pre>{_e(result.command)}</pre>"]
    parts += [f"<p class=note>{_e(_where(result.run))}</p>"]
    parts += [f"<p>{_e(result.note)}</p>"] if result.note else []
    parts += figures(result)
    for place, table in enumerate(result.tables):  # the first is what a result says; the others are its evidence
        block = f"<div class=wide>{html_table(table)}</div>"
        count = f"{len(table.rows)} row{'s' * (len(table.rows) != 1)}"
        opened = " open" if place == 0 or len(table.rows) <= 12 else ""
        parts.append(f"<details{opened}><summary>{_e(table.name)} <small>{count}</small></summary>{block}</details>")
    return "\n".join(parts)


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
