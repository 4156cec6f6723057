"""`qjax formats`: every format by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from qjax.cli import output
from qjax.cli.targets import check_json


@dataclasses.dataclass(frozen=True)
class Formats:
    """List every format: what it stores per weight, how many weights share scales, what it is.

        qjax formats
        qjax formats --json formats.json

    These are the names `qjax.quantize`, plans and configs take. Block 0: a whole row (or matrix) shares its scales.
    Families with parameters know more names than are listed: int5_g64, uint3_g32_mse, uint2_g8_bilevel4x8,
    NF4_b128_dq, FP8_E5M2_b64 ...
    """

    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.formats import FAMILIES

        check_json(self.json)
        rows = [
            {
                "name": fmt.name,
                "bits_per_weight": fmt.bits_per_weight,
                "block": fmt.block,
                "family": family.__name__.rsplit(".", 1)[-1],
                "about": fmt.about,
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
