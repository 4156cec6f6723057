"""Numbers in documents, filled in from result files: between marks that a reader of the document does not see.

Markdown, within a line and over several:

    KL is <!--= recipes/rows kl_mean name=gptq:Q3_K_M -->0.0051<!--/-->.

    <!--= table recipes/rows name kl_mean -->
    | name | KL |
    <!--/-->

LaTeX, where \\result is a macro that sets its second argument:

    KL is \\result{recipes/rows kl_mean name=gptq:Q3_K_M}{$0.0051$}.

    %= table recipes/rows name kl_mean
    \\begin{tabular} ...
    %/

    \\addplot coordinates {
    %= points recipes/rows whole_bits kl_mean
    (4.251,0.0051)
    %/
    };
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from qjax.errors import UserError
from qjax.report.query import answer, is_table, kind_of, view
from qjax.report.schema import Result, Table
from qjax.report.tables import coordinates, escape_markdown, latex, latex_number, markdown

MARKDOWN = re.compile(r"(?P<head><!--=(?P<query>.*?)-->)(?P<old>.*?)(?P<tail><!--/-->)", re.S)
LATEX = re.compile(
    r"(?P<head>\\result\{(?P<query>[^{}]*)\}\{)(?P<old>[^{}]*(?:\{[^{}]*\}[^{}]*)*)(?P<tail>\})"
    r"|(?P<head2>^%=(?P<query2>[^\n]*)\n)(?P<old2>.*?)(?P<tail2>^%/)",
    re.S | re.M,
)
SUFFIXES = (".md", ".tex")


def fill(text: str, results: Mapping[str, Result], path: Path) -> str:
    """The document with every mark's text renewed.

    Args:
      text: of a document.
      results: by their files' names without suffix.
      path: of the document: its suffix says how it is marked, and errors name it.

    Raises:
      UserError: a mark asks for what is not there, or is not closed; the line is named.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a document with numbers to fill in is {' or '.join(SUFFIXES)}")
    tex = path.suffix == ".tex"

    def made(match: re.Match[str]) -> str:
        which = "2" if tex and match["head2"] is not None else ""
        query = match["query" + which]
        try:
            if not tex and "<!--=" in match["old"]:
                raise UserError("a mark before this one is not closed by <!--/-->")
            new = _latex(query, results, bool(which)) if tex else _markdown(query, results)
        except UserError as error:
            line = text.count("\n", 0, match.start()) + 1
            raise UserError(f"{path}:{line}: {' '.join(query.split())}: {error}") from None
        return match["head" + which] + new + match["tail" + which]

    opened, closed = (r"^%=", r"^%/") if tex else ("<!--=", "<!--/-->")
    if len(re.findall(opened, text, re.M)) != len(re.findall(closed, text, re.M)):
        raise UserError(f"{path}: as many marks must be closed ({closed.strip('^')}) as opened ({opened.strip('^')})")
    return (LATEX if tex else MARKDOWN).sub(made, text)


def documents(paths: list[Path]) -> list[Path]:
    """Files, and the Markdown and LaTeX files of folders."""
    found = []
    for path in paths:
        found += sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    return found


def _markdown(query: str, results: Mapping[str, Result]) -> str:
    if kind_of(query) == "points":
        raise UserError("points are for LaTeX: pgfplots draws them")
    if is_table(query):
        return "\n" + markdown(view(query, results))
    return escape_markdown(answer(query, results))


def _latex(query: str, results: Mapping[str, Result], block: bool) -> str:
    if block != is_table(query):
        raise UserError("a table stands between %= and %/, a number in \\result")
    if not block:
        return latex_number(answer(query, results))
    made: Callable[[Table], str] = coordinates if kind_of(query) == "points" else latex
    return made(view(query, results))
