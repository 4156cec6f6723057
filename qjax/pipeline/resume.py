"""A large file written in parts, which survives the death of its writer.

    OUT.partial           the file, at its full size from the start, parts filled in any order
    OUT.partial.journal   line 1: what is being written (key); then one line a finished part with its checksum
    OUT                   appears by rename once every part is there

A part counts as finished when its line is whole and line and bytes still have the checksum, so neither a kill between
the two writes nor a power cut that lost one of them can leave a wrong byte: such a part is simply done again.

Both files are taken only if they are this user's, plain, without another name, and a journal says that a partial file
is one: nobody else's file is written into, nor what a link points at.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import keep_name, owner_of, write_errors
from qjax.io.space import reserve

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
        crc = zlib.crc32(_said(name, offset, note), zlib.crc32(view))
        line = {"part": name, "offset": offset, "nbytes": len(view), "crc32": crc, "note": note}
        _write(self._journal, (json.dumps(line) + "\n").encode())
        self.finished[name] = note
        self._unsynced += len(view)
        if self._unsynced >= _SYNC_EVERY:
            os.fsync(self._fd)
            self._unsynced = 0

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """Bytes of a finished part."""
        return np.frombuffer(os.pread(self._fd, nbytes, offset), np.uint8)


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
      UserError: no space, no permission, no such folder, another process is writing the same file, or a file that
        qjax did not write has the name of the partial file or of its journal.

    A UserError or OSError, from here or from the body, removes the unfinished file; a kill or an interrupt leaves it.
    """
    path = Path(path)
    partial, journal = path.with_name(path.name + ".partial"), path.with_name(path.name + ".partial.journal")
    with write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file")
        log = _locked(journal, path)
        try:
            try:
                lines = _lines(log, journal)
                fd = _open(partial, None if lines else f"{journal.name} does not say how far it is")
            except (UserError, OSError):
                if not os.fstat(log).st_size:
                    journal.unlink()
                raise
            try:
                yield _start(fd, log, lines, key, size, notify, path)
                os.fsync(fd)
                os.replace(partial, path)
                journal.unlink()
                keep_name(path)
            except (UserError, OSError):
                partial.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
                raise
            finally:
                os.close(fd)
        finally:
            os.close(log)


def _open(path: Path, if_filled: str | None = None) -> int:
    """A file of our own, made if it is not there; never what a link points at. `if_filled`: why it must be empty."""
    if path.is_symlink() or path.is_dir():
        raise _foreign(path, "it is no plain file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    found = os.fstat(fd)
    reasons = (
        (not stat.S_ISREG(found.st_mode), "it is no plain file"),
        (found.st_uid != os.geteuid(), "it belongs to another user"),
        (found.st_nlink > 1, "it has a second name"),
        (found.st_size > 0, if_filled),
    )
    for is_so, why in reasons:
        if is_so and why is not None:
            os.close(fd)
            raise _foreign(path, why)
    return fd


def _foreign(path: Path, why: str) -> UserError:
    return UserError(f"{path}: needed for unfinished work, and qjax may not have written it: {why}; move or delete it")


def _locked(journal: Path, path: Path) -> int:
    """The journal, locked, and still the file of that name: a writer that ended meanwhile has removed its own."""
    while True:
        log = _open(journal)
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(log)
            raise UserError(f"another process is writing {path}; wait for it or choose another name") from None
        if owner_of(journal, log):
            return log
        os.close(log)


def _start(
    fd: int, log: int, lines: list[dict[str, Any]], key: str, size: int, notify: Callable[[str], None], path: Path
) -> Partial:
    parts: dict[str, Any] = {}
    if lines and lines[0]["key"] == key:
        parts = {line["part"]: line["note"] for line in lines[1:] if _intact(fd, line, size)}
        if parts:
            notify(f"{path}: continuing, {len(parts)} finished tensors are kept")
    elif lines:
        notify(f"{path}: the unfinished file there came from another model, plan or version; starting over")
    if not parts:  # the file before its journal: one without the other is nobody's
        os.ftruncate(fd, 0)
        os.ftruncate(log, 0)
        os.lseek(log, 0, os.SEEK_SET)
        _write(log, (json.dumps({"key": key}) + "\n").encode())
        os.fsync(log)
    reserve(fd, size)
    return Partial(fd, log, parts)


_FIRST = b'{"key": "'


def _lines(log: int, journal: Path) -> list[dict[str, Any]]:
    """The journal's whole lines, behind which the next ones go; what follows a torn or damaged one is cut off."""
    raw = b"".join(iter(lambda: os.read(log, _READ), b""))
    if raw[: len(_FIRST)] != _FIRST[: len(raw)]:
        raise _foreign(journal, "it is no journal")
    found: list[dict[str, Any]] = []
    end = 0
    for line in raw.split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict) or (not found and not isinstance(value.get("key"), str)):
            break
        found.append(value)
        end += len(line) + 1
    os.ftruncate(log, end)
    os.lseek(log, end, os.SEEK_SET)
    return found


def _said(name: str, offset: int, note: Any) -> bytes:
    """What a line says beside the checksum, which covers it too."""
    return json.dumps([name, offset, note]).encode()


def _intact(fd: int, line: dict[str, Any], size: int) -> bool:
    if set(line) != {"part", "offset", "nbytes", "crc32", "note"}:
        return False
    name, at, left, crc, note = (line[k] for k in ("part", "offset", "nbytes", "crc32", "note"))
    if not isinstance(name, str) or not all(type(v) is int for v in (at, left, crc)):
        return False
    if not (at >= 0 and left >= 0 and at + left <= size):
        return False
    found, said = 0, _said(name, at, note)
    while left:
        raw = os.pread(fd, min(left, _READ), at)
        if not raw:
            return False
        found = zlib.crc32(raw, found)
        at, left = at + len(raw), left - len(raw)
    return zlib.crc32(said, found) == crc


def _write(fd: int, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        view = view[os.write(fd, view) :]


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
