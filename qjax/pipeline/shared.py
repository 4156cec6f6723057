"""The unfinished file and the folder of a walk, as several processes have them: process 0 writes, all know what it has.

    OUT.partial, its journal             process 0's alone; the others are told what is finished, and its bytes
    OUT.partial.calibration/             process 0's
    OUT.partial.calibration/process_1/   process 1's own streams, from a copy of process 0's state on; and so on

So that all go on from one place after a kill, whoever of them had come further. With one process these are
`resumable_file` and `walk_folder`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.pipeline.resume import Partial, resumable_file
from qjax.pipeline.walk_folder import folder_of, walk_folder
from qjax.processes import chief, meet, of_chief, said_by_chief

Notify = Callable[[str], None]


class Shared:
    """A file on its way; `finished` maps each part to its note, once `tell` has been called."""

    def __init__(self, partial: Partial | None):
        self.finished: dict[str, Any] = {} if partial is None else partial.finished
        self._partial = partial

    def tell(self) -> None:
        """What process 0 has finished, for all; each of them calls it."""
        told = json.loads(said_by_chief(json.dumps(self.finished)))
        self.finished = told if self._partial is None else self.finished

    def write(self, name: str, offset: int, raw: np.ndarray | bytes, note: Any = None) -> None:
        """See `Partial.write`; the other processes note that it is there."""
        if self._partial is not None:
            self._partial.write(name, offset, raw, note)
        self.finished[name] = note

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes of a finished part; all processes ask for them together."""
        return of_chief(np.zeros(nbytes, np.uint8) if self._partial is None else self._partial.read(offset, nbytes))


@contextmanager
def shared_file(path: Path, key: str, size: int, notify: Notify) -> Iterator[Shared]:
    """`resumable_file` of process 0, for all; they leave it together, when it has its name."""
    if chief():
        with resumable_file(path, key, size, notify) as partial:
            yield Shared(partial)
    else:
        yield Shared(None)
    meet("file")


@contextmanager
def shared_folder(out: Path, key: str, notify: Notify) -> Iterator[Path]:
    """`walk_folder` of process 0, and for each of the others a folder in it that begins with the same state."""
    if chief():
        with walk_folder(out, key, notify) as folder:
            meet("folder")
            meet("copies")
            yield folder
            meet("walked")  # before the folder goes, and theirs with it
        return
    meet("folder")
    own = folder_of(out) / f"process_{jax.process_index()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    for file in folder_of(out).iterdir():
        if file.is_file():
            os.link(file, own / file.name)  # what is finished is never written again, only replaced or removed
    meet("copies")
    yield own
    meet("walked")
