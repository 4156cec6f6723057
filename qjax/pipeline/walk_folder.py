"""The folder that a walk works in, beside the output: whose it is, and of which run.

OUT.partial.calibration/    the residual stream, the survey and how far the walk has come; gone with the partial file
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.compiled import threads
from qjax.errors import UserError
from qjax.io.atomic import write_errors, write_text
from qjax.pipeline.windows import Calibration
from qjax.recipes import Recipe


def key_of(formats: Mapping[str, tuple[Any, Recipe]], calibration: Calibration | None, tune: Any = None) -> str:
    """Identifies what calibration, recipes and the tuning of blocks make of a model.

    XLA's threads are a part: it cuts sums over tokens into as many pieces, which shows in the last digits of every
    statistic, and those in the codes. So is the number of accelerators, which share the rows of a weight.
    """
    h = hashlib.sha256()
    for path in sorted(formats):
        h.update(f"{path} {formats[path][0].name} {formats[path][1]}\n".encode())
    if tune is not None:
        h.update(f"{tune!r}\n".encode())
    if calibration is not None:
        c = calibration
        backend = jax.default_backend()
        where = f"{backend} {platform.machine()} {threads()} threads"
        where += "" if backend == "cpu" else f" {jax.device_count()} devices"
        h.update(f"{c.tokens.shape} {c.heldout} {c.batch} {c.seed} {where}".encode())
        h.update(np.ascontiguousarray(c.tokens, np.int32).tobytes())
    return h.hexdigest()


_OURS = re.compile(
    r"key|process_\d+|state\.json|survey\.npz|output_curvature_\d+\.npz|(float_)?(x_)?\d+\.f32(\.unfinished)?|\..+\.[0-9a-f]{8}\.tmp"
)


def folder_of(out: Path) -> Path:
    """Where it is."""
    return out.with_name(out.name + ".partial.calibration")


@contextmanager
def walk_folder(out: Path, key: str, notify: Callable[[str], None] = lambda message: None) -> Iterator[Path]:
    """The folder of a walk's state, empty unless it was left by a walk with the same key.

    It goes when the body ends, and with a UserError or OSError; a kill or an interrupt leaves it.

    Raises:
      UserError: the folder of that name holds something that no walk has left there.
    """
    folder = folder_of(out)
    with write_errors(out):
        _check_ours(folder)
        if folder.is_dir() and not _has_key(folder, key):
            if any(folder.iterdir()):
                notify(f"{folder / 'key'}: of another run, or damaged; starting over")
            shutil.rmtree(folder)
        try:
            folder.mkdir(exist_ok=True)
            if not _has_key(folder, key):
                write_text(folder / "key", key)
            yield folder
        except (UserError, OSError) as e:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e.__cause__, OSError) and str(folder) in str(e):
                raise e.__cause__ from None  # it speaks of a file in a folder that is gone: say the output's name
            raise
        shutil.rmtree(folder)


def _has_key(folder: Path, key: str) -> bool:
    try:
        return (folder / "key").read_bytes() == key.encode()
    except OSError:
        return False


def _check_ours(folder: Path) -> None:
    """It will be emptied: what is not ours must not be in it."""
    why = "it is no folder" if folder.is_symlink() or (folder.exists() and not folder.is_dir()) else None
    if why is None and folder.is_dir():
        foreign = sorted(name for name in os.listdir(folder) if not _OURS.fullmatch(name))
        why = f"it holds {foreign[0]!r}" if foreign else None
        why = "it belongs to another user" if folder.stat().st_uid != os.geteuid() else why
    if why is not None:
        raise UserError(f"{folder}: needed for unfinished work, and qjax did not make it: {why}; move or delete it")
