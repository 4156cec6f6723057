"""`qjax fill`: the numbers of documents, from result files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from qjax.errors import UserError

DOCUMENTS_HELP = "Markdown and LaTeX files, and folders of them"


@dataclasses.dataclass(frozen=True)
class Fill:
    """Fill the numbers of documents in from result files, so that none is typed by hand.

        qjax fill README.md docs paper          # writes those that change, and says which
        qjax fill README.md docs --check        # writes nothing; exit code 2 where a document is not what it would be

    A document says between marks which number or table it wants, and holds it too: it reads as it is.

        KL is <!--= recipes/rows kl_mean name=gptq:Q3_K_M -->0.005143 ± 0.000126<!--/-->.

        <!--= table recipes/rows name=recipe kl_mean where whole_bits!=32 :sort=-whole_bits -->
        <!--/-->

    In LaTeX \\result{QUERY}{NUMBER} is a number; a table stands between lines "%= QUERY" and "%/". A query's words:

        FILE/TABLE COLUMN KEY=VALUE KEY=ONE|OTHER KEY!=VALUE      the cell of one row, with its ±
        ... over KEY=VALUE, ... minus KEY=VALUE                   divided by, less the same column of another row
        :of=max (min, mean, count)  :digits=3  :times=-1  :bare   of several rows; how it is written; without ±
        table FILE/TABLE COLUMN=TITLE:DIGITS ... where KEY=VALUE ... :sort=-COLUMN
        pivot FILE/TABLE CELLS ROWS COLUMNS where KEY=VALUE ...
        points FILE/TABLE X Y where KEY=VALUE ...                 coordinates for pgfplots, in LaTeX alone

    FILE is a result file's name without .json. `qjax report FILE` shows its tables.
    """

    documents: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help=DOCUMENTS_HELP)] = ()
    results: Annotated[Path, tyro.conf.arg(metavar="DIR", help="the folder of result files")] = Path(
        "experiments/results"
    )
    check: Annotated[bool, tyro.conf.arg(help="write nothing, fail where a document would change")] = False

    def execute(self) -> None:
        from qjax.io.atomic import write_text
        from qjax.io.text import read_text
        from qjax.report.fill import documents, fill
        from qjax.report.result import read

        if not self.documents:
            raise UserError("give documents, or folders of them: qjax fill README.md docs")
        results = {path.stem: read(path) for path in sorted(self.results.rglob("*.json"))}
        if not results:
            raise UserError(f"--results {self.results}: no result files (*.json) there")
        old = {path: read_text(path) for path in documents(list(self.documents))}
        new = {path: fill(text, results, path) for path, text in old.items()}
        changed = [path for path in old if old[path] != new[path]]
        if self.check and changed:
            said = ", ".join(map(str, changed))
            raise UserError(f"{said}: not what the result files say; run the command without --check")
        for path in changed:
            write_text(path, new[path])
            print(f"filled {path}")
        print(f"{len(old)} documents, {len(changed)} changed")
