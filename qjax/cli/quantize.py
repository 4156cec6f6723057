"""`qjax quantize MODEL -o OUT`: a model file in, a quantized one out."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli import output
from qjax.cli.model import MODEL_HELP
from qjax.cli.progress import bytes_bar
from qjax.cli.recipes import RECIPES
from qjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a model and write it.

        qjax quantize reference -o small.gguf --type Q4_K_M
        qjax quantize path/to/directory -o small.gguf --plan plan.toml
        qjax quantize reference -o directory --type NF4

    OUT.gguf is streamed tensor by tensor in bounded memory, continues where a killed run stopped, and runs in
    llama.cpp. Any other OUT becomes a Hugging Face directory that holds the quantized values as floats.

    A plan file says which weight gets which format; patterns are globs over params paths or GGUF names, the first wins:

        [rules]
        "embed/embedding" = "Q6_K"
        "layers_*/mlp/down/kernel" = "Q5_K"
        "*" = "Q4_K"
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT", help="what to write")]
    type: Annotated[str | None, tyro.conf.arg(metavar="TYPE", help="llama-quantize's file type, or a format")] = None
    plan: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="a plan file instead of a type")] = None
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME", help="how to round; see `qjax recipes`")] = "rtn"
    calib: Annotated[Path | None, tyro.conf.arg(metavar="TEXT", help="calibration text, for recipes with one")] = None
    requantize: Annotated[bool, tyro.conf.arg(help="allow a MODEL that is quantized already")] = False
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        if (self.type is None) == (self.plan is None):
            raise UserError("quantize needs either --type (as in --type Q4_K_M) or --plan FILE")
        if self.recipe not in RECIPES:
            raise UserError(f"unknown recipe {self.recipe!r}; there is {', '.join(RECIPES)}")
        if self.calib is not None:
            raise UserError(f"--calib: recipe {self.recipe!r} takes no calibration text; leave the option out")
        from qjax.io.checkpoint import locate

        path = locate(self.model)
        clock = time.perf_counter()
        streams = self.out.suffix == ".gguf" and path.suffix != ".bin"
        report = self._stream(path) if streams else self._in_memory(path)
        seconds = time.perf_counter() - clock
        head = {"model": self.model, "out": str(self.out), "type": self.type, "recipe": self.recipe}
        if output.write_json(self.json, {**head, "seconds": seconds, **report.to_dict()}):
            return
        output.console().print(report.table())
        size = output.size(report.nbytes)
        print(f"{self.out}: {size}, {report.bits_per_weight:.3f} bits per weight, {seconds:.1f} s")

    def _stream(self, path: Path) -> Any:
        from qjax.pipeline import quantize_file
        from qjax.pipeline.source import open_source
        from qjax.plan import Plan
        from qjax.plan.named import is_mix, plan_named

        plan: str | Plan
        if self.plan is not None:
            plan = Plan.from_toml(self.plan)
        else:
            assert self.type is not None
            plan = self.type if is_mix(self.type) else plan_named(self.type, open_source(path).config)
        with bytes_bar(f"quantize {self.model}") as progress:
            return quantize_file(
                path, self.out, plan,
                requantize=self.requantize, progress=progress, notify=lambda line: print(line, file=sys.stderr),
            )  # fmt: skip

    def _in_memory(self, path: Path) -> Any:
        from qjax.io.checkpoint import load, save
        from qjax.pipeline import quantize_params
        from qjax.plan import Plan
        from qjax.plan.named import plan_named

        model = load(path)
        plan = Plan.from_toml(self.plan) if self.plan is not None else plan_named(str(self.type), model.config)
        if self.requantize:
            model = dataclasses.replace(model, params=model.dense)
        qparams, report = quantize_params(model.params, plan)
        save(dataclasses.replace(model, params=qparams), self.out)
        return report
