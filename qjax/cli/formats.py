"""`qjax formats`: every format by name."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import tyro

from qjax.cli import output


@dataclasses.dataclass(frozen=True)
class Formats:
    """List every format: what it stores per weight, how many weights share scales, what it is.

        qjax formats
        qjax formats --json formats.json

    These are the names `qjax.quantize`, plans and configs take. Block 0: the whole row shares its scales.
    """

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.formats import FAMILIES

        rows = [
            {
                "name": fmt.name,
                "bits_per_weight": fmt.bits_per_weight,
                "block": fmt.block,
                "family": family.__name__.rsplit(".", 1)[-1],
                "about": _first_sentence(fmt),
            }
            for family in FAMILIES
            for fmt in family.FORMATS
        ]
        if output.write_json(self.json, {"formats": rows}):
            return
        output.table(
            ("name", "bits", "block", "family", "what it is"),
            [(r["name"], f"{r['bits_per_weight']:.4g}", r["block"], r["family"], r["about"]) for r in rows],
            numbers=(1, 2),
        )


def _first_sentence(fmt: object) -> str:
    about = getattr(fmt, "about", None) or inspect.getdoc(type(fmt)) or ""
    return " ".join(about.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
