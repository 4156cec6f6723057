"""`qjax recipes`: every way of rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from qjax.cli import output

# name: (what it needs, what it is). A format says which grid; a recipe says how weights are rounded to it.
RECIPES = {
    "rtn": ("nothing", "nearest level, scales by the format's own search on the plain squared error"),
}


@dataclasses.dataclass(frozen=True)
class Recipes:
    """List the recipes `qjax quantize --recipe` takes: how weights are rounded onto a format's grid.

    qjax recipes
    qjax quantize MODEL -o out.gguf --type Q3_K_M --recipe imatrix --calib book.txt
    """

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        rows = [{"name": name, "needs": needs, "about": about} for name, (needs, about) in RECIPES.items()]
        if not output.write_json(self.json, {"recipes": rows}):
            output.table(("name", "needs", "what it is"), [tuple(row.values()) for row in rows])
