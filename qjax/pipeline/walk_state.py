"""What a walk leaves in its folder, so that another run goes on behind the last finished block.

state.json              {"blocks": how many are done}, written last
x_<i>.f32               the residual stream in front of block i; float_x_<i>.f32 the float model's, where it is needed
survey.npz              see `survey`
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from qjax.io.atomic import atomic_file, write_text
from qjax.pipeline.activations import Activations, reopen
from qjax.pipeline.survey import Survey


@dataclasses.dataclass(frozen=True)
class Streams:
    """The residual stream behind the rounded weights and, for the cross term, in the float model."""

    x: Activations
    x_float: Activations | None = None

    def drop(self) -> None:
        """Delete their files."""
        self.x.drop()
        if self.x_float is not None:
            self.x_float.drop()


def commit(folder: Path | None, blocks: int, stale: Streams | None = None) -> None:
    """From here on a new run starts behind so many blocks; the streams in front of the last one are not needed."""
    if folder is not None:
        write_text(folder / "state.json", json.dumps({"blocks": blocks}))
    if stale is not None:
        stale.drop()


def resumed(folder: Path | None, shape: tuple[int, ...], both: bool) -> tuple[int, Streams | None]:
    """How many blocks are done, and the streams behind them; 0 and None where there is nothing to go on from.

    Args:
      folder: of the walk.
      shape: of a stream.
      both: whether the float model's stream is needed too.
    """
    if folder is None or not (folder / "state.json").is_file():
        return 0, None
    blocks = int(json.loads((folder / "state.json").read_text())["blocks"])
    x = reopen(folder, f"x_{blocks}", shape)
    x_float = reopen(folder, f"float_x_{blocks}", shape) if both else None
    if x is None or (both and x_float is None):
        return 0, None
    return blocks, Streams(x, x_float)


def save_survey(folder: Path, made: Survey) -> None:
    """Keep a survey."""
    arrays = {f"sensitivity_{i}": a for i, a in enumerate(made.sensitivity)} | {
        "embedding": made.embedding,
        "head": made.head,
        "tokens": np.asarray(made.tokens),
        "head_sensitivity": made.head_sensitivity,
    }
    with atomic_file(folder / "survey.npz") as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def saved_survey(folder: Path | None, blocks: int) -> Survey | None:
    """The survey that an earlier run has kept."""
    if folder is None or not (folder / "survey.npz").is_file():
        return None
    with np.load(folder / "survey.npz") as z:
        layers = tuple(z[f"sensitivity_{i}"] for i in range(blocks))
        return Survey(z["embedding"], z["head"], int(z["tokens"]), layers, z["head_sensitivity"])
