"""`qjax kernels`: what multiplies with the weights of each format, on each platform, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli import output
from qjax.cli.targets import check_json
from qjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kernels:
    """List what would multiply with packed weights of each format: on a CPU, a GPU, a TPU, and why.

        qjax kernels                         # one row of activations at a time, as in generation
        qjax kernels --rows 512              # many, as in a prompt or in training
        qjax kernels Q4_K int4_g128          # these formats only, with the reasons
        qjax kernels --json kernels.json

    A kernel is a line of a table (qjax/kernels/dispatch.py): of those for the platform the first that fits format, rows
    and type of the activations. "xla" is compiled by XLA from plain JAX, "pallas" written by hand.
    """

    formats: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FORMAT", help="names of formats; none: all")
    ] = ()
    rows: Annotated[int, tyro.conf.arg(metavar="N", help="rows of activations: tokens at a time")] = 1
    shape: Annotated[
        tuple[int, int], tyro.conf.arg(metavar="OUT IN", help="of the matrix; IN a multiple of the format's block")
    ] = (4096, 4096)
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.formats import format_names
        from qjax.kernels import PLATFORMS

        check_json(self.json)
        for name, sizes in (("--rows", (self.rows,)), ("--shape", self.shape)):
            if min(sizes) < 1:
                raise UserError(f"{name} {' '.join(map(str, sizes))}: expected at least 1")
        rows = [self._row(name) for name in self.formats or format_names()]
        if output.write_json(self.json, {"rows": self.rows, "shape": list(self.shape), "formats": rows}):
            return
        if not self.formats:
            output.table(
                ("format", *PLATFORMS),
                [(row["name"], *(_named(row[platform]) for platform in PLATFORMS)) for row in rows],
            )
            taken = {_named(row[p]): row[p]["about"] for row in rows for p in PLATFORMS}
            output.pairs(taken.items())
            return
        output.table(
            ("format", "platform", "kernel", "what it does", "not taken"),
            [
                (row["name"], platform, _named(row[platform]), row[platform]["about"], _passed(row[platform]))
                for row in rows
                for platform in PLATFORMS
            ],
        )

    def _row(self, name: str) -> dict[str, Any]:
        """The kernels of a format, by platform."""
        from qjax.formats import format
        from qjax.kernels import PLATFORMS, Call, choice
        from qjax.tensor import check_length

        fmt = format(name)
        check_length(fmt, self.shape[1], f"--shape {self.shape[0]} {self.shape[1]}")
        found: dict[str, Any] = {"name": fmt.name}
        for platform in PLATFORMS:
            kernel, passed = choice(Call(fmt, self.shape, self.rows), platform)
            assert kernel is not None  # "auto" always has one
            found[platform] = {
                "kernel": kernel.name,
                "implementation": kernel.implementation,
                "about": kernel.about,
                "passed": [{"kernel": other.name, "why": why} for other, why in passed],
            }
        return found


def _named(choice: dict[str, Any]) -> str:
    return f"{choice['kernel']} ({choice['implementation']})"


def _passed(choice: dict[str, Any]) -> str:
    return "; ".join(f"{other['kernel']}: {other['why']}" for other in choice["passed"])
