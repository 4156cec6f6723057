"""`qjax quantize MODEL -o OUT`: a model file in, a quantized one out."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from qjax.cli import output
from qjax.cli.calibration import Texts, check_windows, texts_of, windows_of
from qjax.cli.model import MODEL_HELP
from qjax.cli.process import JOIN_HELP
from qjax.cli.progress import bytes_bar, in_turn, steps_bar
from qjax.cli.targets import FORCE_HELP, check_json, check_output
from qjax.cli.tuning import BlockSteps, Steps, Within, block_tuner, check_steps, tuned
from qjax.errors import UserError
from qjax.terminal import say, shown


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a model and write it.

        qjax quantize reference -o small.gguf --type Q4_K_M
        qjax quantize path/to/directory -o small.gguf --plan plan.toml
        qjax quantize reference -o directory --type NF4
        qjax quantize reference -o small.gguf --type Q3_K_M --recipe best_gguf
        qjax quantize reference -o small.gguf --type Q3_K_M --recipe best_gguf --calib book.txt --calib folder

    A recipe says how weights are rounded onto the type's grid (`qjax recipes` lists them). All but rtn look at what
    the model does with a text (--calib), which should be like the texts it will be used on; without one, or with
    `--calib self`, the model writes it. An eighth is held out, and the table shows each weight's loss on both parts;
    best_gguf holds a quarter out, to tell how far the rest is to be believed, and then uses all of it. `imatrix` also
    takes llama.cpp's file (--imatrix).

    OUT.gguf is streamed tensor by tensor in bounded memory, continues where a killed run stopped, and runs in
    llama.cpp. Any other OUT becomes a Hugging Face directory that holds the quantized values as floats. What is printed
    is a line a type; --verbose prints a line a tensor, and --json has them always.

    Behind the rounding --tune 100 moves what is continuous, scales, offsets and norms, toward the float model's
    predictions; codes and sizes stay. It holds both models in memory, and starts over after a kill. --tune-blocks 50
    does so for each block's scales on its output, as the walk comes by, and continues with it; with --tune-within also
    while it is rounded, with its weights that are not yet. Windows held out decide which step is kept, the start among
    them.

    Several processes, on one machine or many, share the windows of the text and the rows of each weight: the same
    command in each, with --join HOST:PORT/PROCESSES/PROCESS, and OUT in a folder that all of them see. Process 0 writes
    it, to the bytes of one process.

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
    calib: Texts = ()
    calib_ctx: Annotated[int | None, tyro.conf.arg(metavar="N", help="tokens a calibration window")] = None
    calib_windows: Annotated[
        int | None, tyro.conf.arg(metavar="N", help="calibration windows at most: 128, or 32,768 tokens of self")
    ] = None
    tune: Steps = 0
    tune_blocks: BlockSteps = 0
    tune_within: Within = False
    seed: Annotated[int, tyro.conf.arg(metavar="N", help="of labels, and of a text, drawn from the model")] = 0
    imatrix: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="llama.cpp's importance matrix")] = None
    requantize: Annotated[bool, tyro.conf.arg(help="allow a MODEL that is quantized already")] = False
    verbose: Annotated[bool, tyro.conf.arg(help="print a line a tensor, not only one a type")] = False
    force: Annotated[bool, tyro.conf.arg(help=FORCE_HELP)] = False
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None
    join: Annotated[str | None, tyro.conf.arg(metavar="LINE", help=JOIN_HELP)] = None

    def execute(self) -> None:
        from qjax.processes import joined

        if self.join is not None and (self.tune or self.tune_blocks):
            raise UserError("--tune and --tune-blocks run in one process; leave --join out")
        with joined(self.join):
            self._execute()

    def _execute(self) -> None:
        if (self.type is None) == (self.plan is None):
            raise UserError("quantize needs either --type (as in --type Q4_K_M) or --plan FILE")
        check_windows(self.calib_windows)
        check_steps(self.tune, self.tune_blocks, self.tune_within)
        from qjax.io.checkpoint import locate
        from qjax.pipeline.ledger import ledger, said
        from qjax.processes import chief
        from qjax.recipes import recipe

        made = recipe(self.recipe)
        if made.format is not None:
            raise UserError(
                f"--recipe {self.recipe}: the format comes from --type or --plan; say {made.name or 'it'} alone"
            )
        changes = [r.name for r in made.reparams]
        if changes and self.out.suffix == ".gguf":
            raise UserError(
                f"--recipe {self.recipe}: a GGUF file has no place for {changes[0]}; `qjax fuse` folds scales and "
                "rotations into the model, and what it writes can be quantized by other recipes"
            )
        if "act" in changes:
            raise UserError(f"--recipe {self.recipe}: a folder of floats cannot say that inputs are rounded too")
        if self.plan is None and not made.requires and self.calib and not self.tune:
            raise UserError(f"--calib: recipe {self.recipe!r} takes no calibration text; leave the option out")
        texts = texts_of(self.calib)
        if self.imatrix is not None and made.requires - {"h"}:
            raise UserError(f"--imatrix holds less than recipe {self.recipe!r} needs; give --calib TEXT instead")

        path = locate(self.model)
        inputs = (path, self.plan, *texts, self.imatrix)
        writes = self.join is None or chief()
        if writes:
            check_output(self.out, inputs, self.force)
            check_json(self.json, (*inputs, self.out))
        clock = time.perf_counter()
        streams = self.out.suffix == ".gguf" and path.suffix != ".bin" and not self.tune
        report = self._stream(path) if streams else self._in_memory(path)
        seconds = time.perf_counter() - clock
        if not writes:
            return
        head = {"model": self.model, "out": str(self.out), "type": self.type, "recipe": self.recipe}
        written = sum(f.stat().st_size for f in (self.out.iterdir() if self.out.is_dir() else (self.out,)))
        if output.write_json(
            self.json, {**head, "seconds": seconds, "written": written, **report.to_dict(), "ledger": ledger(report)}
        ):
            return
        if self.verbose:
            output.console().print(report.table())
        output.table(*report.summary())
        for line in said(report):
            print(shown(line))
        size = output.size(report.nbytes)
        print(f"{shown(self.out)}: {size}, {report.bits_per_weight:.3f} bits per weight, {seconds:.1f} s")
        if self.out.is_dir():
            print(f"The directory holds what these stand for as F32: {output.size(written)} on disk")

    def _stream(self, path: Path) -> Any:
        from qjax.pipeline import quantize_file
        from qjax.pipeline.source import open_source
        from qjax.plan import Plan

        source = open_source(path)
        importance, calibration = self._importance(source.config), self._calibration(source)
        plan: Plan | str = Plan.from_toml(self.plan) if self.plan is not None else str(self.type)
        bars = bytes_bar(f"quantize {self.model}"), steps_bar(f"{self.recipe} {self.model}")
        with in_turn(*bars) as (progress, walked):
            return quantize_file(
                path, self.out, plan,
                recipe=self.recipe, calibration=calibration, importance=importance, requantize=self.requantize,
                metadata=self._said(), tune=block_tuner(self.tune_blocks, self.tune_within), progress=progress,
                walked=walked, notify=say,
            )  # fmt: skip

    def _said(self) -> dict[str, Any]:
        """What the file will say of the importance matrix."""
        if self.imatrix is None:
            return {}
        from qjax.io.imatrix import read_imatrix, said_of

        return said_of(self.imatrix, read_imatrix(self.imatrix))

    def _in_memory(self, path: Path) -> Any:
        import jax.numpy as jnp

        from qjax.io.checkpoint import load, save
        from qjax.pipeline import quantize_model, quantize_params
        from qjax.plan import Plan
        from qjax.plan.named import plan_named
        from qjax.processes import by_chief
        from qjax.recipes import recipe

        model = load(path)
        known = bool(self.imatrix or recipe(self.recipe).requires)
        plan = Plan.from_toml(self.plan) if self.plan is not None else plan_named(str(self.type), model.config, known)
        if self.requantize:
            model = dataclasses.replace(model, params=model.dense)
        floats, calibration = model, self._calibration(model)
        if self.tune_blocks and not self._looks:
            raise UserError(f"--tune-blocks: recipe {self.recipe!r} looks at no text; take gptq or best_gguf")
        if not self._looks:
            stats = {p: jnp.asarray(h) for p, h in self._importance(model.config).items()}
            with in_turn(bytes_bar(f"quantize {self.model}")) as (progress,):
                qparams, report = quantize_params(model.params, plan, stats, recipe=self.recipe, progress=progress)
            if plan.note:
                say(plan.note)
            model = dataclasses.replace(model, params=qparams)
        else:
            with in_turn(steps_bar(f"{self.recipe} {self.model}")) as (walked,):
                model, report = quantize_model(
                    model, plan, self.recipe, calibration,
                    tune=block_tuner(self.tune_blocks, self.tune_within), progress=walked, notify=say,
                )  # fmt: skip
        if self.tune:
            model, report = tuned(floats, model, report, calibration, self.tune, self.model)
        by_chief("model", lambda: save(model, self.out))
        return report

    @property
    def _looks(self) -> bool:
        """Whether rounding looks at a text."""
        from qjax.recipes import recipe

        return bool(self.calib) or bool(recipe(self.recipe).requires and self.imatrix is None)

    def _calibration(self, model: Any) -> Any:
        """Windows of the texts; of the model's own where they are needed and none is given."""
        if not self._looks and not self.tune:
            return None
        return windows_of(
            model, self.model, self.calib, context=self.calib_ctx, windows=self.calib_windows, seed=self.seed
        )

    def _importance(self, config: Any) -> dict[str, Any]:
        """{path: f32[in]} of the importance file."""
        if self.imatrix is None:
            return {}
        from qjax.calibrate import stats_of_imatrix
        from qjax.io.imatrix import read_imatrix
        from qjax.models.families import weight_names

        found = stats_of_imatrix(read_imatrix(self.imatrix), weight_names(config))
        return {name: np.asarray(s.h) for name, s in found.items()}
