"""`qjax plan MODEL -o PLAN`: the formats that lose least for so many bytes."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qjax.cli import output
from qjax.cli.calibration import Texts, texts_of, windows_of
from qjax.cli.model import MODEL_HELP
from qjax.cli.targets import FORCE_HELP, check_json, check_output
from qjax.errors import UserError
from qjax.terminal import bar

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WINDOWS = 8
"""Windows of text unless the user says more: half of them to measure on, half to check."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Choose a format for every weight, so that the model's measured KL is least at a size.

        qjax plan MODEL -o plan.toml --bits 3.5 --calib book.txt
        qjax plan MODEL -o plan.toml --size 80MB --html plan.html
        qjax plan MODEL -o plan.toml --size Q3_K_M                  # as large as that mix, and better
        qjax quantize MODEL -o small.gguf --plan plan.toml --recipe best_gguf --calib book.txt

    One group of weights after another (q and k, v, o, gate and up, down of each layer) is rounded alone, to a few
    formats, and KL to the float model is measured; the formats of all groups are then chosen so that the sum is least
    (exactly: an integer program), the whole is measured, and the costs are corrected once by what parts of the whole
    cost together. Uniform plans and llama-quantize's mixes of no more bytes are measured beside it on windows that
    nothing was chosen by: the best of all is written. The model is in memory in float32.

    --size counts tensors; a GGUF file's vocabulary and names come to it. With --for vllm q, k and v share a format,
    gate and up another, and embedding and head stay floats.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="PLAN", help="the plan file to write (.toml)")]
    bits: Annotated[float | None, tyro.conf.arg(metavar="B", help="bits a weight, over the whole model")] = None
    size: Annotated[
        str | None, tyro.conf.arg(metavar="SIZE", help="80MB, 1.5GiB, or a file type of llama-quantize: as large as it")
    ] = None
    reader: Annotated[Literal["llama.cpp", "vllm"], tyro.conf.arg(name="for", help="what will read the model")] = (
        "llama.cpp"
    )
    formats: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="NAME", help="to choose from, in place of the reader's")
    ] = ()
    calib: Texts = ()
    calib_ctx: Annotated[int | None, tyro.conf.arg(metavar="N", help="tokens a window")] = None
    windows: Annotated[int, tyro.conf.arg(metavar="N", help="half to measure on, half to check the whole on")] = WINDOWS
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME", help="how weights are rounded to be measured")] = "imatrix"
    measured: Annotated[int, tyro.conf.arg(metavar="N", help="formats of a group that are run")] = 2
    mend: Annotated[bool, tyro.conf.arg(help="correct costs by what parts of the whole plan cost together")] = True
    seed: Annotated[int, tyro.conf.arg(metavar="N", help="of a text drawn from the model")] = 0
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="a page: bits by layer, all candidates")] = None
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None
    force: Annotated[bool, tyro.conf.arg(help=FORCE_HELP)] = False

    def execute(self) -> None:
        if self.out.suffix != ".toml":
            raise UserError(f"-o {self.out}: a plan is a .toml file; qjax quantize --plan makes the model of it")
        for option, least in (("windows", 2), ("measured", 1)):
            if getattr(self, option) < least:
                raise UserError(f"--{option} {getattr(self, option)}: {least} is the least")
        budget = budget_of(self.bits, self.size)
        texts = texts_of(self.calib)
        check_output(self.out, (self.model, *texts), self.force)
        check_json(self.json, (self.model, self.out, *texts))
        check_json(self.html, (self.model, self.out, self.json, *texts))
        from qjax.budget import plan_for
        from qjax.budget.told import rows_of
        from qjax.io.atomic import write_text
        from qjax.io.checkpoint import load_float

        model = load_float(self.model)
        text = windows_of(model, self.model, self.calib, context=self.calib_ctx, windows=self.windows, seed=self.seed)
        clock = time.perf_counter()
        with bar(f"plan of {self.model}") as update:
            plan, found = plan_for(
                model, text.tokens, **budget, target=self.reader, formats=self.formats, recipe=self.recipe,
                measured=self.measured, mend=self.mend, progress=lambda what, done, total: update(done, total, what),
            )  # fmt: skip
        write_text(self.out, plan.to_toml())
        rows = rows_of(model.config, plan, found)
        self._tell(found, rows, time.perf_counter() - clock)

    def _tell(self, found: Any, rows: dict[str, list[dict[str, Any]]], seconds: float) -> None:
        """Print, and write the page and the numbers."""
        from qjax import rundir
        from qjax.io.atomic import write_text
        from qjax.report.build import build
        from qjax.report.page import page
        from qjax.report.result import write

        title, command = f"Formats for {self.model}", ["qjax", *sys.argv[1:]]
        facts = rundir.describe(command=command)
        result = build(rows, title=title, command=shlex.join(command), manifest=facts)
        if self.html is not None:
            write_text(self.html, page([result], title))
        if self.json is not None and str(self.json) != "-":
            write(result, self.json)
        if str(self.json) == "-":
            output.write_json(self.json, rows)
            return
        output.table(
            ["plan", "bits", "size", "sum of parts", "KL, nats"],
            [
                [c["name"], f"{c['whole_bits']:.3f}", output.size(c["bytes"]),
                 "" if c["predicted"] is None else f"{c['predicted']:.5f}", f"{c['kl']:.5f} ± {c['kl_se']:.5f}"]
                for c in rows["plans"]
            ],
            range(1, 5),
        )  # fmt: skip
        held = [[r["format"], r["tensors"], f"{r['weights']:,}"] for r in rows["formats"]]
        output.table(["format", "tensors", "weights"], held, (1, 2))
        print(f"{self.out}: {found.best.name}, {seconds:.0f} s")


def budget_of(bits: float | None, size: str | None) -> dict[str, Any]:
    """What `plan_for` takes, of --bits and --size.

    >>> budget_of(None, "80MB"), budget_of(3.5, None), budget_of(None, "Q3_K_M")
    ({'nbytes': 80000000.0}, {'bits': 3.5}, {'like': 'Q3_K_M'})
    """
    if (bits is None) == (size is None):
        raise UserError("plan needs either --bits (as in --bits 3.5) or --size (80MB, or Q3_K_M: as large as that)")
    if size is None:
        if not bits or bits <= 0:
            raise UserError(f"--bits {bits}: bits a weight are above 0")
        return {"bits": bits}
    from qjax.plan.named import is_mix

    if is_mix(size):
        return {"like": size}
    said = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", size)
    if said is None or said[2].upper() not in UNITS or said[1].count(".") > 1 or said[1] == ".":
        raise UserError(f"--size {size}: expected a size such as 80MB or 1.5GiB, or a file type such as Q3_K_M")
    return {"nbytes": float(said[1]) * UNITS[said[2].upper()]}
