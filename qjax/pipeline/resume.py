"""A large file written in parts, which survives the death of its writer.

    OUT.partial           the file, at its full size from the start, parts filled in any order
    OUT.partial.journal   line 1: what is being written (key); then one line a finished part with its checksum
    OUT                   appears by rename once every part is there

A part counts as finished when its line is whole and its bytes still have the checksum, so neither a kill between the
two writes nor a power cut that lost one of them can leave a wrong byte: such a part is simply done again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import sync_folder, write_errors

_SYNC_EVERY = 64 << 20  # bytes after which the disk is asked to keep up, so that the last sync is short
_READ = 1 << 20


class Partial:
    """A file on its way. `finished` maps each part already there to the note that came with it."""

    def __init__(self, fd: int, journal: int, finished: dict[str, Any]):
        self.finished = finished
        self._fd, self._journal, self._unsynced = fd, journal, 0

    def write(self, name: str, offset: int, raw: np.ndarray | bytes, note: Any = None) -> None:
        """Store a part for good: its bytes, then its line."""
        view = (raw.data if isinstance(raw, np.ndarray) else memoryview(raw)).cast("B")
        _write_at(self._fd, view, offset)
        line = {"part": name, "offset": offset, "nbytes": len(view), "crc32": zlib.crc32(view), "note": note}
        _write(self._journal, (json.dumps(line) + "\n").encode())
        self.finished[name] = note
        self._unsynced += len(view)
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._fd)
            self._unsynced = 0


@contextmanager
def resumable_file(
    path: str | Path, key: str, size: int, notify: Callable[[str], None] = lambda message: None
) -> Iterator[Partial]:
    """Open a file that gets its name when the body ends without an exception.

    Args:
      path: the final name.
      key: identifies what is written; parts left by a writer with the same key are kept, others are dropped.
      size: bytes of the finished file; the space is reserved at once.
      notify: told in one line when earlier work is continued or dropped.

    Yields: a Partial.

    Raises:
      UserError: no space, no permission, no such folder, or another process is writing the same file.

    A UserError or OSError, from here or from the body, removes the unfinished file; a kill or an interrupt leaves it.
    """
    path = Path(path)
    partial, journal = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.journal")
    with write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file")
        log = os.open(journal, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(log, path)
            fd = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                yield _start(fd, log, key, size, notify, path)
                os.fsync(fd)
                os.replace(partial, path)
                journal.unlink()
                sync_folder(path.parent)
            except (UserError, OSError):
                partial.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        finally:
            os.close(log)


def _lock(log: int, path: Path) -> None:
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {path}; wait for it or choose another name") from None


def _start(fd: int, log: int, key: str, size: int, notify: Callable[[str], None], path: Path) -> Partial:
    lines = _lines(log)
    parts: list[dict[str, Any]] = []
    if lines and lines[0].get("key") == key:
        parts = [line for line in lines[1:] if _intact(fd, line, size)]
        if parts:
            notify(f"{path}: continuing, {len(parts)} finished tensors are kept")
    elif lines:
        notify(f"{path}: the unfinished file there came from another model, plan or version; starting over")
    if not parts:
        os.ftruncate(fd, 0)
    os.ftruncate(log, 0)
    os.lseek(log, 0, os.SEEK_SET)
    for line in [{"key": key}, *parts]:
        _write(log, (json.dumps(line) + "\n").encode())
    _reserve(fd, size)
    return Partial(fd, log, {line["part"]: line["note"] for line in parts})


def _reserve(fd: int, size: int) -> None:
    """Take the space now, so that a full disk shows before the work and not behind it."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot reserve
                raise
    os.ftruncate(fd, size)


def _lines(log: int) -> list[dict[str, Any]]:
    """The journal's whole lines; what follows a torn or foreign line is not trusted."""
    raw = b"".join(iter(lambda: os.read(log, _READ), b""))
    found = []
    for line in raw.split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found


def _intact(fd: int, line: dict[str, Any], size: int) -> bool:
    try:
        at, left, crc, _, _ = (line[k] for k in ("offset", "nbytes", "crc32", "part", "note"))
        if not (at >= 0 and left >= 0 and at + left <= size):
            return False
    except (KeyError, TypeError):
        return False
    found = 0
    while left:
        raw = os.pread(fd, min(left, _READ), at)
        if not raw:
            return False
        found = zlib.crc32(raw, found)
        at, left = at + len(raw), left - len(raw)
    return found == crc


def _write(fd: int, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[os.write(fd, view) :]


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
