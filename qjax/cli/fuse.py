"""`qjax fuse MODEL -o OUT`: the same model in other variables, which are easier to round."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qjax.cli.model import MODEL_HELP
from qjax.cli.targets import FORCE_HELP, check_output
from qjax.errors import UserError

if TYPE_CHECKING:
    from qjax.models.model import Model
    from qjax.pipeline import Calibration


@dataclasses.dataclass(frozen=True)
class Fuse:
    """Fold a rotation or channel scales into a model's weights. Its output does not change; what rounding loses does.

        qjax fuse reference -o rotated.gguf --rotate 0 --untie
        qjax fuse path/to/directory -o scaled --scale "awq_scale()" --format Q4_K --calib book.txt
        qjax fuse reference -o spun.gguf --rotate 0 --untie --learn uint2_g64 --calib book.txt
        qjax fuse path/to/directory -o smooth --scale "smooth(0.5)" --calib book.txt

    --rotate turns the residual stream (and each head's values) by a random Hadamard matrix, QuaRot's R1 and R2; norm
    gains are folded into the weights behind them first. Round what comes out with error feedback (gptq, best_gguf):
    with nearest rounding a rotation often loses. A model whose head is its embedding cannot be rotated as it is:
    --untie gives it a head of its own.

    --learn FORMAT moves these rotations on, SpinQuant's way, to where rounding onto that format loses least; windows
    held out decide which of the --learn-steps is kept.

    --scale searches a factor for every channel between a norm or a linear layer and those behind it.

    OUT.gguf is a GGUF file in F32, any other OUT a Hugging Face directory; both run anywhere, and `qjax quantize`
    takes them.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=MODEL_HELP)]
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT", help="what to write")]
    rotate: Annotated[int | None, tyro.conf.arg(metavar="SEED", help="rotate, with signs of this seed")] = None
    values: Annotated[bool, tyro.conf.arg(help="rotate the values of each head too")] = True
    untie: Annotated[bool, tyro.conf.arg(help="give a tied model a head of its own")] = False
    scale: Annotated[str | None, tyro.conf.arg(metavar="SEARCH", help="smooth(...), awq_scale(...) or rescale()")] = (
        None
    )
    format: Annotated[str, tyro.conf.arg(metavar="NAME", help="the grid that awq_scale searches with")] = "Q4_K"
    learn: Annotated[str | None, tyro.conf.arg(metavar="FORMAT", help="learn the rotations for this format")] = None
    learn_steps: Annotated[int | None, tyro.conf.arg(metavar="N", help="of --learn, Cayley's: 100")] = None
    calib: Annotated[Path | None, tyro.conf.arg(metavar="TEXT", help="calibration text, for --scale and --learn")] = (
        None
    )
    calib_ctx: Annotated[int | None, tyro.conf.arg(metavar="N", help="tokens a calibration window")] = None
    calib_windows: Annotated[int, tyro.conf.arg(metavar="N", help="calibration windows at most")] = 64
    force: Annotated[bool, tyro.conf.arg(help=FORCE_HELP)] = False

    def execute(self) -> None:
        if self.rotate is None and self.scale is None:
            raise UserError("fuse needs --rotate SEED, --scale SEARCH, or both")
        if self.learn is not None and (self.rotate is None or self.scale is not None):
            raise UserError("--learn moves the rotations that --rotate SEED begins with, and goes without --scale")
        if self.learn_steps is not None and (self.learn is None or self.learn_steps < 1):
            raise UserError(f"--learn-steps {self.learn_steps}: at least 1, beside --learn FORMAT")
        if (self.scale is None and self.learn is None) != (self.calib is None):
            raise UserError(
                "--scale and --learn look at a text: they go with --calib TEXT, and --calib with one of them"
            )
        from qjax.config import check_seed
        from qjax.io.checkpoint import load, locate, save
        from qjax.io.text import read_text
        from qjax.models.fuse import rotated
        from qjax.pipeline import calibration_text
        from qjax.pipeline.fused import fused_scales
        from qjax.recipes import reparam

        if self.rotate is not None:
            check_seed("--rotate", self.rotate)
        path = locate(self.model)
        check_output(self.out, (path, self.calib), self.force)
        model = load(path)
        if self.calib is not None:
            text = read_text(self.calib)
            calibration = calibration_text(model, text, context=self.calib_ctx, limit=self.calib_windows)
        if self.scale is not None:
            model = fused_scales(
                model, reparam(self.scale), self.format, calibration,
                progress=lambda done: print(f"observed {done} batches", file=sys.stderr),
            )  # fmt: skip
        if self.learn is not None:
            model = self._learned(model, calibration)
        elif self.rotate is not None:
            model = rotated(model, self.rotate, self.values, self.untie)
        save(model, self.out)
        print(f"{self.out}: the same model, {'rotated' if self.rotate is not None else 'scaled'}")

    def _learned(self, model: Model, calibration: Calibration) -> Model:
        """The model in learned coordinates."""
        from qjax.plan import Plan
        from qjax.terminal import bar
        from qjax.training.tuning.descent import Tuning
        from qjax.training.tuning.rotations import learn_rotations

        if model.config.tied and not self.untie:
            raise UserError("--learn: the head of this model is the embedding; --untie gives it one of its own")
        plan = Plan.from_dict({"rules": {"layers_*": self.learn, "*": "keep"}}, "--learn")
        tuning = Tuning(self.learn_steps or 100, rate=1.5)
        with bar(f"rotations of {self.model}") as update:

            def progress(step: int, loss: float) -> None:
                update(step, tuning.steps, f"KL held out {loss:.4g}")

            model, found = learn_rotations(
                model, plan, calibration, tuning, seed=self.rotate or 0, values=self.values, progress=progress,
            )  # fmt: skip
        print(f"rotations: {found}")
        return model
