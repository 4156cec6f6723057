"""`--tune` and `--tune-blocks` of `qjax quantize`: gradient steps behind the rounding."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qjax.errors import UserError

if TYPE_CHECKING:
    from qjax.models.model import Model
    from qjax.pipeline import Calibration, Report
    from qjax.training.tuning.blocks import TuneBlocks

Steps = Annotated[int, tyro.conf.arg(metavar="N", help="steps that tune scales and norms on the KL to the float model")]
Within = Annotated[bool, tyro.conf.arg(help="with --tune-blocks: within blocks too, with what is not yet rounded")]
BlockSteps = Annotated[int, tyro.conf.arg(metavar="N", help="steps that tune each block's scales on its own output")]


def check_steps(tune: int, tune_blocks: int, within: bool = False) -> None:
    """Raise UserError for a number of steps below 0, and for a tuning within blocks of none."""
    for name, steps in (("--tune", tune), ("--tune-blocks", tune_blocks)):
        if steps < 0:
            raise UserError(f"{name} {steps}: a number of steps, 100 as a rule, or 0 for none")
    if within and not tune_blocks:
        raise UserError("--tune-within says where blocks are tuned too; say for how long, as in --tune-blocks 50")


def block_tuner(steps: int, within: bool = False) -> TuneBlocks | None:
    """The stage of a walk that tunes blocks; None for no steps."""
    if not steps:
        return None
    from qjax.training.tuning.blocks import TuneBlocks
    from qjax.training.tuning.descent import Tuning

    return TuneBlocks(Tuning(steps=steps), within)


def tuned(
    model: Model, quantized: Model, report: Report, calibration: Calibration, steps: int, name: str
) -> tuple[Model, Report]:
    """The model behind so many steps end to end, and its report: errors are those of what is written.

    Args:
      model: the float model.
      quantized, report: what rounding made of it.
      calibration: windows; some held out.
      steps: of the descent.
      name: for the progress.
    """
    from qjax.evaluate.sizes import relative_rmse
    from qjax.terminal import bar
    from qjax.training.grid.weights import leaves_by_path
    from qjax.training.tuning.descent import Tuning
    from qjax.training.tuning.end_to_end import tune

    with bar(f"tune {name}") as update:

        def progress(step: int, loss: float) -> None:
            update(step, steps, f"KL held out {loss:.4g}")

        new, found = tune(model, quantized, calibration, Tuning(steps=steps), progress=progress)
    floats, packed = leaves_by_path(model.params), leaves_by_path(new.params)
    lines: list[Any] = [
        line if line.kept else dataclasses.replace(line, error=relative_rmse(packed[line.name], floats[line.name]))
        for line in report.tensors
    ]
    return new, dataclasses.replace(report, tensors=tuple(lines), tuned={"said": str(found), **found.to_json()})
