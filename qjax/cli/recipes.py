"""`qjax recipes`: every named way of rounding."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import tyro

from qjax.cli import output
from qjax.cli.targets import check_json


@dataclasses.dataclass(frozen=True)
class Recipes:
    """List the recipes `qjax quantize --recipe` takes: how weights are rounded onto a format's grid.

        qjax recipes
        qjax quantize MODEL -o out.gguf --type Q3_K_M --recipe best_gguf --calib book.txt
        qjax quantize MODEL -o out.gguf --type Q4_K_M --recipe "nearest('h') >> ldlq() >> descend(2)" --calib book.txt

    A recipe is a line of stages: the table shows each name's line, and any such line is a recipe too.
    """

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.recipes import RECIPES, recipe

        check_json(self.json)
        rows = []
        for name, make in RECIPES.items():
            made = recipe(name)
            rows.append(
                {
                    "name": name,
                    "needs": "a calibration text" if made.requires else "nothing",
                    "stages": str(made),
                    "about": (inspect.getdoc(make) or "").splitlines()[0],
                }
            )
        if not output.write_json(self.json, {"recipes": rows}):
            output.table(("name", "needs", "what it is", "stages"),
                         [(r["name"], r["needs"], r["about"], r["stages"]) for r in rows])  # fmt: skip
