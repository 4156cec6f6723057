"""Runs as TensorBoard reads them: the rows of metrics.jsonl as scalars, config and final numbers as hyperparameters.

OUT/RUN/           the run's own metrics.jsonl, its config and the scalars of its results.json
OUT/RUN/ARM/       that of a training below it
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.errors import UserError
from qjax.rundir import logged
from qjax.runs import Run

LOG = "metrics.jsonl"


def export(runs: Mapping[str, Run], out: Path) -> None:
    """Write runs into a folder of their own.

    Args:
      runs: by the names they get below it.
      out: a folder that is new or empty: TensorBoard would add up two exports.

    Raises:
      UserError: tensorboardX is not installed, the folder holds something, or a log is damaged.
    """
    try:
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams
    except ImportError:
        raise UserError("--tensorboard: tensorboardX is not installed; pip install 'qjax[tensorboard]'") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--tensorboard {out}: exists and is no empty folder; give a new one")
    for name, run in runs.items():
        # One writer a folder: the names of event files tell no two writers of one moment apart.
        for log in sorted({run.path / LOG, *run.path.rglob(LOG)}):
            with SummaryWriter(str(out / name / log.parent.relative_to(run.path))) as writer:
                for number, row in enumerate(logged(log), 1):
                    for key, value in scalars(row).items():
                        writer.add_scalar(key, value, row["step"] if _is_number(row.get("step")) else number)
                if log.parent == run.path:
                    final = finals(run)
                    for summary in hparams({k: _plain(v) for k, v in run.config.items()}, final):
                        writer.file_writer.add_summary(summary)
                    for key, value in final.items():
                        writer.add_scalar(key, value)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of a log, but for its step."""
    return {key: value for key, value in row.items() if key != "step" and _is_number(value)}


def finals(run: Run) -> dict[str, float]:
    """The numbers of a run that are not in lists, under final/: they must not be taken for points of a curve."""
    return {f"final/{k}": v for k, v in run.numbers.items() if not any(part.isdigit() for part in k.split("."))}


def _plain(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
