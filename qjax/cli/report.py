"""`qjax report`: result files and runs as Markdown, LaTeX or a page; a run as a result file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qjax.errors import UserError, check_word
from qjax.sweep import SWEEP

if TYPE_CHECKING:
    from qjax.report.schema import Result

FORMATS = {".md": "md", ".tex": "latex", ".html": "html", ".json": "json", ".svg": "svg"}
OUT_HELP = "file to write: .md, .tex, .html (one page that stands alone), .json (one result), .svg (one figure)"
FIGURE_HELP = (
    "one figure of all results, first on an .html page or alone as .svg: kl, perplexity, rates, amount, bits, errors, "
    "weights, grid, outliers, tokens, training, drift, roofline, sum"
)
PATHS_HELP = "result files, folders of them, run directories"
FORMAT_HELP = "md, latex or html; none: as the suffix of --out says, md without one"


@dataclasses.dataclass(frozen=True)
class Report:
    """Show results: tables with units and intervals, and what each was made by.

        qjax report experiments/results                     # all of them as Markdown
        qjax report experiments/results -o results.html     # one page: sortable tables, figures
        qjax report experiments/results/recipes.json --format latex
        qjax report A.json B.json --figure kl -o kl.svg     # one figure, here of both results' models
        qjax report runs/qat-20260101-120000                # a run: its results.json and manifest.json
        qjax report runs/sweeps/rates -o rates.html         # all runs of a sweep
        qjax report runs/qat-20260101-120000 -o experiments/results/qat.json --title "QAT" --note "two idle cores"

    PATHS are result files, folders of them, and run directories. The last line makes a result file of a run: nothing is
    in it that the run does not say; what is not known about where it ran is named in the note.
    """

    paths: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help=PATHS_HELP)] = ()
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",), metavar="FILE", help=OUT_HELP)] = None
    format: Annotated[str, tyro.conf.arg(help=FORMAT_HELP)] = ""
    title: Annotated[
        str, tyro.conf.arg(help="heading of the page, or of the result file; none: as it was, or the run's name")
    ] = ""
    note: Annotated[
        str, tyro.conf.arg(help="what a reader of the result file must know, such as other jobs beside it")
    ] = ""

    figure: Annotated[str, tyro.conf.arg(help=FIGURE_HELP)] = ""

    def execute(self) -> None:
        from qjax.io.atomic import check_folder, write_text
        from qjax.report.figures.drawing import alone
        from qjax.report.figures.kinds import one_figure
        from qjax.report.page import latex_page, markdown_page, page
        from qjax.report.result import write

        kind = kind_of(self.out, self.format)
        if self.figure and kind not in ("svg", "html"):
            raise UserError(f"--figure {self.figure}: -o FILE.svg holds a figure alone, -o FILE.html has it first")
        if kind == "svg" and not self.figure:
            raise UserError(f"-o {self.out}: say which figure, as in --figure kl")
        if not self.paths:
            raise UserError("give result files, folders of them, or run directories: qjax report experiments/results")
        if self.out is not None:
            check_folder(self.out)
        results = list(results_in(self.paths))
        if kind == "json" and self.out is not None:
            if len(results) != 1:
                raise UserError(f"-o {self.out}: a result file holds one result, got {len(results)}; give one run")
            (result,) = results
            note = "; ".join(filter(None, (self.note, result.note)))
            write(dataclasses.replace(result, title=self.title or result.title, note=note), self.out)
            return
        if kind == "html":
            title = self.title or ("Results" if len(results) > 1 else results[0].title)
            text = page(results, title, self.figure)
        elif kind == "svg":
            text = alone(one_figure(results, self.figure))
        else:
            text = {"md": markdown_page, "latex": latex_page}[kind](results)
        if self.out is None:
            print(text, end="")
        else:
            write_text(self.out, text)


def kind_of(out: Path | None, format: str) -> str:
    """md, latex, html or json, from --format or the suffix of --out."""
    if format:
        check_word("--format", format, ("md", "latex", "html"))
        return format
    if out is None:
        return "md"
    if out.suffix not in FORMATS:
        raise UserError(f"-o {out}: unknown suffix {out.suffix!r}; give {', '.join(FORMATS)}, or --format")
    return FORMATS[out.suffix]


def results_in(paths: Iterable[Path]) -> Iterator[Result]:
    """The results of files, of run directories, and of folders of both in the order of their names.

    Raises:
      UserError: there is none, or one is damaged.
    """
    from qjax.report.build import from_run
    from qjax.report.result import read

    for path in paths:
        if (path / "manifest.json").is_file():
            yield from_run(path)
        elif path.is_dir():
            inside = sorted(p.parent if p.name == "manifest.json" else p for p in _files(path))
            if not inside:
                raise UserError(f"{path}: neither result files (*.json) nor the manifest.json of a run")
            yield from results_in(inside)
        else:
            yield read(path)


def _files(folder: Path) -> Iterator[Path]:
    """Result files below a folder, and of runs their manifests alone; what a sweep says of its own is neither."""
    for at, inside, names in os.walk(folder):
        if "manifest.json" in names:
            inside[:], names = [], ["manifest.json"]
        yield from (Path(at) / name for name in names if name.endswith(".json") and name != SWEEP and name[0] != ".")
