"""`qjax export MODEL -o OUT --to NAME`: a model in the layout that another library reads."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli import output
from qjax.cli.calibration import Texts, check_windows, texts_of, windows_of
from qjax.cli.model import MODEL_HELP
from qjax.cli.progress import count_bar, in_turn, steps_bar
from qjax.cli.targets import FORCE_HELP, check_json, check_output
from qjax.errors import UserError
from qjax.terminal import say, shown

GGUF = "gguf"


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a model as another library's checkpoint: codes and scales as they are, in that library's places.

        qjax export reference -o small --to compressed-tensors --type int4_g32            # round on the way
        qjax export path/to/directory -o small --to gptq --type uint4_g128 --recipe gptq --calib book.txt
        qjax export path/to/gptq_directory -o small --to compressed-tensors               # from one into another
        qjax export path/to/gptq_directory -o small.gguf --to gguf                        # the same values in llama.cpp

    With --type or --plan a MODEL of floats is rounded, as `qjax quantize` does it, and packed. Without them MODEL is
    quantized already (such a directory, or a GGUF file): every packed weight goes over with the very values it has, or
    the command says which cannot and ends. Then --type with --requantize rounds anew.

    --to names the container; docs/exports.md has what each of them holds, and who reads it:

        compressed-tensors  compressed-tensors_w8a8  gptq  gptq_v2  awq  bitsandbytes  mlx  onnx  gguf

    Embeddings and the head stay floats but where a container packs them too. No container has a place for changes of
    variables that a layer would have to run (rotations, channel scales): fold them in with `qjax fuse`, then export.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT", help="the directory (or .gguf file) to write")]
    to: Annotated[str, tyro.conf.arg(metavar="NAME", help="the container")]
    type: Annotated[str | None, tyro.conf.arg(metavar="TYPE", help="a format, see `qjax formats`")] = None
    plan: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="a plan file instead of a type")] = None
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME", help="how to round; see `qjax recipes`")] = "rtn"
    calib: Texts = ()
    calib_ctx: Annotated[int | None, tyro.conf.arg(metavar="N", help="tokens a calibration window")] = None
    calib_windows: Annotated[int | None, tyro.conf.arg(metavar="N", help="calibration windows at most: 128")] = None
    seed: Annotated[int, tyro.conf.arg(metavar="N", help="of labels, and of a text, drawn from the model")] = 0
    requantize: Annotated[bool, tyro.conf.arg(help="round a MODEL that is quantized already")] = False
    verbose: Annotated[bool, tyro.conf.arg(help="print a line a tensor, not only one a type")] = False
    force: Annotated[bool, tyro.conf.arg(help=FORCE_HELP)] = False
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None

    def execute(self) -> None:
        from qjax.io.checkpoint import locate
        from qjax.io.exports import CONTAINERS, container
        from qjax.recipes import recipe

        if self.to != GGUF:
            container(self.to)
        if (self.out.suffix == ".gguf") != (self.to == GGUF):
            one = "name OUT .gguf" if self.to == GGUF else f"{self.to} is a directory: name OUT without .gguf"
            raise UserError(f"-o {self.out} --to {self.to}: {one}; containers are gguf, {', '.join(CONTAINERS)}")
        if self.type is not None and self.plan is not None:
            raise UserError("give --type or --plan FILE, not both")
        rounds = self.type is not None or self.plan is not None
        if self.to == GGUF and rounds:
            raise UserError("--to gguf takes packed weights over as they are; `qjax quantize -o OUT.gguf` rounds")
        if not rounds and (self.recipe != "rtn" or self.calib):
            raise UserError("--recipe and --calib round, and without --type or --plan nothing is rounded")
        check_windows(self.calib_windows)
        made = recipe(self.recipe)
        if made.format is not None:
            raise UserError(f"--recipe {self.recipe}: the format comes from --type or --plan; say {made.name} alone")
        if self.plan is None and not made.requires and self.calib:
            raise UserError(f"--calib: recipe {self.recipe!r} takes no calibration text; leave the option out")
        path = locate(self.model)
        inputs = (path, self.plan, *texts_of(self.calib))
        check_output(self.out, inputs, self.force)
        check_json(self.json, (*inputs, self.out))
        clock = time.perf_counter()
        report = self._export(path)
        seconds = time.perf_counter() - clock
        written = sum(f.stat().st_size for f in (self.out.iterdir() if self.out.is_dir() else (self.out,)))
        head = {"model": self.model, "out": str(self.out), "to": self.to, "type": self.type, "recipe": self.recipe}
        if output.write_json(self.json, {**head, "seconds": seconds, "written": written, **report.to_dict()}):
            return
        if self.verbose:
            output.console().print(report.table())
        output.table(*report.summary())
        bits = f"{report.bits_per_weight:.3f} bits per weight"
        print(f"{shown(self.out)}: {self.to}, {output.size(written)}, {bits}, {seconds:.1f} s")

    def _export(self, path: Path) -> Any:
        from qjax.pipeline.export import export_model
        from qjax.pipeline.export_gguf import export_gguf

        bars = count_bar(f"export {self.model}", "weights"), steps_bar(f"{self.recipe} {self.model}")
        with in_turn(*bars) as (counted, walked):

            def progress(name: str, done: int, total: int) -> None:
                counted(done, total)

            if self.to == GGUF:
                return export_gguf(path, self.out, progress=progress)
            return export_model(
                path, self.out, self.to, self._plan(),
                recipe=self.recipe, calibration=self._calibration(path), requantize=self.requantize,
                progress=progress, walked=walked, notify=say,
            )  # fmt: skip

    def _plan(self) -> Any:
        from qjax.plan import Plan

        return Plan.from_toml(self.plan) if self.plan is not None else self.type

    def _calibration(self, path: Path) -> Any:
        from qjax.pipeline.source import open_source
        from qjax.recipes import recipe

        if not recipe(self.recipe).requires and not self.calib:
            return None
        return windows_of(
            open_source(path), self.model, self.calib,
            context=self.calib_ctx, windows=self.calib_windows, seed=self.seed,
        )  # fmt: skip
