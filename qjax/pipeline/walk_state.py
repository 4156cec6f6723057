"""What a walk leaves in its folder, so that another run goes on behind the last finished block.

state.json              {"blocks": how many are done, "crc32": {stream: its checksum}}, written last
x_<i>.f32               the residual stream in front of block i; float_x_<i>.f32 the float model's, where it is needed
survey.npz              see `survey`; output_curvature_<i>.npz: G of block i; row_sensitivity_<i>.npz: of groups of rows

What is damaged is named, and done again.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import atomic_file, write_text
from qjax.io.npz import read_arrays
from qjax.pipeline.activations import Activations, Streams, reopen
from qjax.pipeline.massive import Massive
from qjax.pipeline.output_curvature import BY_ROWS, OutputCurvature
from qjax.pipeline.survey import Survey

Notify = Callable[[str], None]


def commit(folder: Path | None, blocks: int, streams: Streams, stale: Streams | None = None) -> None:
    """From here on a new run starts behind so many blocks; the streams in front of the last one are not needed."""
    if folder is not None:
        crc32 = {
            a.path.name: zlib.crc32(a.array.data) for a in (streams.x, streams.x_float) if a is not None and a.path
        }
        write_text(folder / "state.json", json.dumps({"blocks": blocks, "crc32": crc32}))
    if stale is not None:
        stale.drop()


def resumed(
    folder: Path | None, shape: tuple[int, ...], both: bool, notify: Notify = lambda message: None
) -> tuple[int, Streams | None]:
    """How many blocks are done, and the streams behind them; 0 and None where there is nothing to go on from.

    Args:
      folder: of the walk.
      shape: of a stream.
      both: whether the float model's stream is needed too.
      notify: told which file is damaged.
    """
    if folder is None or not (folder / "state.json").is_file():
        return 0, None
    try:
        state = json.loads((folder / "state.json").read_bytes())
        blocks, crc32 = state["blocks"], dict(state["crc32"])
        if type(blocks) is not int or blocks < 0:
            raise ValueError
    except (ValueError, TypeError, KeyError, RecursionError):
        notify(f"{folder / 'state.json'}: damaged; starting over")
        return 0, None
    found: list[Activations] = []
    for name in (f"x_{blocks}", *((f"float_x_{blocks}",) if both else ())):
        stream = reopen(folder, name, shape)
        if stream is None or zlib.crc32(stream.array.data) != crc32.get(f"{name}.f32"):
            notify(f"{folder / name}.f32: {'missing' if stream is None else 'damaged'}; starting over")
            return 0, None
        found.append(stream)
    return blocks, Streams(*found)


def save_survey(folder: Path, made: Survey) -> None:
    """Keep a survey."""
    arrays = {f"sensitivity_{i}": a for i, a in enumerate(made.sensitivity)} | {
        "embedding": made.embedding,
        "head": made.head,
        "tokens": np.asarray(made.tokens),
        "head_sensitivity": made.head_sensitivity,
        "alike": made.alike,
        "massive": np.asarray(json.dumps([dataclasses.asdict(m) for m in made.massive])),
    }
    with atomic_file(folder / "survey.npz") as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def saved_survey(
    folder: Path | None,
    blocks: int,
    shape: tuple[int, ...],
    notify: Notify = lambda message: None,
    two_sided: bool = False,
    guided: bool = False,
) -> Survey | None:
    """The survey that an earlier run has kept.

    Args:
      folder: of the walk.
      blocks: of the model.
      shape: of a stream: windows, context, dim.
      notify: told if a file is damaged.
      two_sided: whether G is wanted.
      guided: whether what tokens count by groups of rows is.
    """
    if folder is None or not (folder / "survey.npz").is_file():
        return None
    *windows, dim = shape
    try:
        z = read_arrays(folder / "survey.npz")
        layers = tuple(z[f"sensitivity_{i}"] for i in range(blocks))
        fits = all(a.ndim == 3 and list(a.shape[1:]) == windows for a in layers)
        fits &= z["embedding"].shape == z["head"].shape == (dim, dim) and list(z["head_sensitivity"].shape) == windows
        fits &= z["alike"].shape == (blocks, *windows) and z["alike"].dtype == bool
        if not fits:
            raise UserError("of another shape")
        lines = [Massive(**{**line, "positions": tuple(line["positions"])}) for line in json.loads(str(z["massive"]))]
        parts = z["embedding"], z["head"], int(z["tokens"]), layers, z["head_sensitivity"], z["alike"]
    except (UserError, KeyError, TypeError, ValueError):
        notify(f"{folder / 'survey.npz'}: damaged; made again")
        return None
    outputs = OutputCurvature(folder if two_sided else None)
    by_rows = OutputCurvature(folder if guided else None, BY_ROWS)
    try:
        for i in range(blocks):
            outputs.of(i), by_rows.of(i)
    except UserError as e:
        notify(f"{e}; made again")
        return None
    return Survey(*parts, tuple(lines), outputs, by_rows)
