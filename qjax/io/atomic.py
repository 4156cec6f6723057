"""Files and folders that appear whole or not at all.

    write under a temporary name beside the target  ->  fsync  ->  rename onto the target  ->  fsync the folder

A rename within one folder is atomic (POSIX rename(2)), so a reader sees the old file or the new one, and a kill, a
full disk or an error on the way leaves the target as it was.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from qjax.errors import UserError

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file grew past the allowed size",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such folder",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.EISDIR: "it is a folder, not a file",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the body into one line: `cannot write PATH: the disk is full; ...`."""
    try:
        yield
    except OSError as e:
        reason = _REASONS.get(e.errno or 0, e.strerror or str(e))
        raise UserError(f"cannot write {path}: {reason}; nothing was left under that name") from e


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that gets its name only when the body ends without an exception.

    Args:
      path: the final name; an existing file is replaced.

    Yields: the open temporary file, seekable, in the same folder.

    Raises:
      UserError: no space, no permission, no such folder, or the target is a folder.
    """
    path = Path(path)
    with write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file")
        temporary = _temporary(path)
        try:
            with open(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Make a folder that gets its name only when the body ends without an exception.

    An existing folder is replaced only where the new one holds a file for each of its files, so that a save over an
    earlier save works and a mistyped folder loses nothing.

    Args:
      path: the final name.

    Yields: the temporary folder, beside the final one, to be filled with files.

    Raises:
      UserError: as `atomic_file`; or the folder exists and holds something that the new one does not.
    """
    path = Path(os.path.abspath(path))  # so that "." and ".." have a name and a parent
    with write_errors(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.EEXIST, "it is a file, not a folder")
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            sync_folder(temporary)
            _move_onto(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}.tmp"


def _move_onto(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    kept = sorted({f.name for f in path.iterdir()} - {f.name for f in new.iterdir()})
    if kept:
        raise UserError(
            f"cannot write {path}: the folder exists and holds {kept[0]!r}, which would be lost; choose another name"
        )
    old = _temporary(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as f:
        f.write(text.encode())
