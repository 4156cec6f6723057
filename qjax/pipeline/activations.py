"""The residual stream of all calibration windows: in memory, or mapped in a folder, so that a long text fits a disk.

x_0 -> block 0 -> x_1 -> block 1 -> ...          one file an x, written under another name until it is whole
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from qjax.io.space import mapped


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """f32[windows, context, dim].

    Attributes:
      array: the numbers, a memory map where there is a folder.
      path: their file.
    """

    array: np.ndarray
    path: Path | None = None

    def drop(self) -> None:
        """Delete the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


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


class Writer:
    """Activations being written; `done()` gives them their name."""

    def __init__(self, folder: Path | None, name: str, shape: tuple[int, ...]):
        self._path = None if folder is None else folder / f"{name}.f32"
        if self._path is None:
            self.array = np.empty(shape, np.float32)
        else:
            with open(_unfinished(self._path), "w+b") as f:
                self.array = mapped(f, np.float32, shape)

    def done(self) -> Activations:
        """The finished activations; on disk for good before their name appears."""
        if self._path is None:
            return Activations(self.array)
        self.array.flush()  # type: ignore[attr-defined]
        os.replace(_unfinished(self._path), self._path)
        return Activations(self.array, self._path)


def reopen(folder: Path, name: str, shape: tuple[int, ...]) -> Activations | None:
    """Activations that an earlier run finished, or None."""
    path = folder / f"{name}.f32"
    if not path.is_file() or path.stat().st_size != 4 * int(np.prod(shape)):
        return None
    return Activations(np.memmap(path, np.float32, "r", shape=shape), path)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".unfinished")
