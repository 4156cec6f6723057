"""Space on a disk, taken before it is used."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import reason_of


def reserve(fd: int, size: int) -> None:
    """Give an open file its size and take the space now: a full disk shows before the work, and writing into a mapping
    of the file cannot fail, which would kill the process (SIGBUS).

    Raises:
      OSError: no space.
    """
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot reserve
                raise
    os.ftruncate(fd, size)


def mapped(file: IO[bytes], dtype: Any, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An empty, open file as an array of that shape, its space reserved. Raises OSError where there is none."""
    reserve(file.fileno(), int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(file, dtype, "r+", shape=shape)


def scratch(dtype: Any, shape: tuple[int, ...], folder: str | Path | None = None) -> np.memmap[Any, Any]:
    """An array in a temporary file without a name, gone with the array.

    Args:
      dtype, shape: of the array.
      folder: where; None: the system's folder for temporary files.

    Raises:
      UserError: no space.
    """
    folder = Path(tempfile.gettempdir() if folder is None else folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the closed, unlinked file
            return mapped(file, dtype, shape)
    except OSError as e:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raise UserError(
            f"cannot keep {size:,} bytes in {folder}: {reason_of(e)}; make room, or name another folder with TMPDIR"
        ) from e


def let_go(*arrays: Any) -> None:
    """Have the pages of mapped arrays leave this process, not their files: what a pass has looked at need not stay
    resident until its end. Other arrays stay as they are."""
    for array in arrays:
        pages = getattr(array, "_mmap", None)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)


def aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty f32 array that `jax.device_put` takes over on a CPU without a copy: it begins at 64 bytes."""
    size = 4 * int(np.prod(shape))
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(np.float32).reshape(shape)
