"""`qjax bench kernels | generate`: what products and texts take on this machine, as a result file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qjax.cli import output
from qjax.cli.model import MODEL_HELP
from qjax.cli.targets import check_json
from qjax.errors import UserError

JSON_HELP = 'write a result file, which `qjax report` shows ("-": to standard output instead of the table)'


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Products with packed weights against dense ones: time, share of the bandwidth of a copy, error.

        qjax bench kernels                                          # small, for a CPU
        qjax bench kernels --shapes 4096x4096 4096x14336 --rows 1 8 64 --dtype bfloat16 --cold-mb 512 --json h100.json
        qjax report h100.json --figure roofline -o h100.svg

    Every product runs over matrices of their own that no cache holds, in one program; the copy's bandwidth, the peak of
    products and dense bfloat16 are measured in the same process.
    """

    formats: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FORMAT", help="of the weights")] = (
        "Q4_0", "Q8_0", "Q4_K", "Q6_K", "int4_g128", "NF4",
    )  # fmt: skip
    shapes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="OUTxIN", help="of the matrices")] = ("1024x1024",)
    rows: Annotated[tuple[int, ...], tyro.conf.arg(metavar="M", help="rows of activations")] = (1, 8)
    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(help="of the activations")] = "float32"
    implementation: Annotated[Literal["auto", "xla", "pallas"], tyro.conf.arg(help="which kernels")] = "auto"
    every: Annotated[bool, tyro.conf.arg(help="all kernels that fit, not only the one that is taken")] = False
    rivals: Annotated[bool, tyro.conf.arg(help="other libraries' products of four bits, where they run here")] = False
    cold_mb: Annotated[int, tyro.conf.arg(metavar="MB", help="of weights in a program; more than caches hold")] = 64
    rounds: Annotated[int, tyro.conf.arg(metavar="N", help="calls timed; the median counts")] = 7
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=JSON_HELP)] = None

    def execute(self) -> None:
        check_json(self.json)
        from qjax.bench.products import Contest, contest
        from qjax.bench.rivals import RIVALS
        from qjax.kernels.dispatch import running_on

        absent = {rival: rival.unfit(running_on()) for rival in RIVALS if self.rivals}
        for rival, why in absent.items():
            if why:
                print(f"[without {rival.name}: {why}]", file=sys.stderr)
        c = Contest(
            self.formats, tuple(map(_shape, self.shapes)), self.rows, self.dtype, self.implementation,
            self.cold_mb << 20, self.rounds, every=self.every,
            rivals=tuple(rival for rival, why in absent.items() if not why),
        )  # fmt: skip
        _tell(contest(c), "Products with packed weights", "kernels", self.json, {
            "product": lambda r: f"{r['name']} {r['out']}x{r['in']}, {r['rows']} rows", "kernel": lambda r: r["kernel"],
            "ms": lambda r: f"{1e3 * r['seconds']:.3f}", "GB/s": lambda r: f"{r['gb_per_second']:.2f}",
            "of a copy": lambda r: f"{r['of_copy']:.2f}", "over bfloat16": lambda r: f"{r['over_bfloat16']:.2f}",
            "error": lambda r: f"{r['error']:.1e}",
        })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generate:
    """Tokens a second from weights decoded to float32, and from packed ones.

        qjax bench generate small.gguf
        qjax bench generate small.gguf --batch 8 --cache Q8_0 --json tokens.json

    Time to compile is in no number.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)] = "reference"
    prompt: Annotated[int, tyro.conf.arg(metavar="N", help="tokens of a prompt, drawn at random")] = 16
    tokens: Annotated[int, tyro.conf.arg(metavar="N", help="made behind it, at least 4")] = 48
    batch: Annotated[int, tyro.conf.arg(metavar="N", help="texts at a time")] = 1
    rounds: Annotated[int, tyro.conf.arg(metavar="N", help="texts timed; the median counts")] = 3
    cache: Annotated[str | None, tyro.conf.arg(metavar="FORMAT", help="of keys and values, such as Q8_0")] = None
    dtype: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(help="of the arithmetic in blocks")] = "float32"
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=JSON_HELP)] = None

    def execute(self) -> None:
        check_json(self.json, (self.model,))
        import qjax
        from qjax.bench.texts import Texts, contest

        t = Texts(self.prompt, self.tokens, self.batch, self.rounds, self.cache, self.dtype)
        _tell(contest(qjax.load(self.model), t), f"Text from {self.model}", "generate", self.json, {
            "weights": lambda r: r["name"], "size": lambda r: output.size(r["weight_bytes"]),
            "first token, s": lambda r: f"{r['first_token_seconds']:.3f}",
            "tokens/s": lambda r: f"{r['tokens_per_second']:.1f}",
            "same tokens": lambda r: "yes" if r["same_tokens"] else "no",
        })  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bench:
    """What products and texts take on this machine: `qjax bench kernels`, `qjax bench generate`."""

    command: Annotated[
        Annotated[Kernels, tyro.conf.subcommand("kernels", prefix_name=False)]
        | Annotated[Generate, tyro.conf.subcommand("generate", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def execute(self) -> None:
        self.command.execute()


def _shape(text: str) -> tuple[int, int]:
    out, _, n = text.partition("x")
    if not (out.isdecimal() and n.isdecimal()):
        raise UserError(f"--shapes {text}: expected OUTxIN, such as 4096x14336")
    return int(out), int(n)


def _tell(
    rows: Iterable[dict[str, Any]], title: str, name: str, json: Path | None, cells: dict[str, Callable[..., str]]
) -> None:
    """Print the rows, and write them as a result file."""
    from qjax import rundir
    from qjax.report.build import build
    from qjax.report.result import write

    found = list(rows)
    if str(json) != "-":
        columns = list(cells)
        output.table(columns, [[cell(row) for cell in cells.values()] for row in found], range(1, len(columns)))
    if json is None:
        return
    manifest = rundir.describe(command=["qjax", *sys.argv[1:]])
    if str(json) == "-":
        output.write_json(json, {name: found, "device": manifest["device"], "versions": manifest["versions"]})
        return
    note = "medians; the copy's bandwidth and the peak of products were measured in the same process"
    command = " ".join(manifest["command"])
    write(build({name: found}, title=title, command=command, note=note, manifest=manifest), json)
