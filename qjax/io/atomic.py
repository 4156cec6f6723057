"""Files and folders that appear whole or not at all.

    write under a temporary name beside the target  ->  fsync  ->  rename onto the target  ->  fsync the folder

A rename within one folder is atomic (POSIX rename(2)), so a reader sees the old file or the new one, and a kill, a
full disk or an error on the way leaves the target as it was. A folder takes an existing one's place in one step too
where the system can exchange two names (Linux, renameat2(2)); elsewhere the old one is renamed first, and for a
moment, or after a kill in it, the name is free and the old folder lies beside it.

A writer locks what it writes. A temporary file that nobody has locked was left by a kill; the next writer of the same
name clears it away.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

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
    errno.ELOOP: "it is a symbolic link",
}


def reason_of(error: OSError) -> str:
    """What went wrong, for people."""
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the body into one line: `cannot write PATH: the disk is full; ...`."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {path}: {reason_of(e)}; nothing was left under that name") from e


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
        _clear_stale(path)
        temporary, fd = _locked(path, lambda new: os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            with open(fd, "w+b") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    keep_name(path)


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
        _clear_stale(path)
        temporary, fd = _locked(path, _new_folder)
        try:
            yield temporary
            for file in temporary.iterdir():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            sync_folder(temporary)
            _move_onto(temporary, path)
        except BaseException as e:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(e, UserError) and isinstance(e.__cause__, OSError) and str(temporary) in str(e):
                raise e.__cause__ from None  # it speaks of a file in a folder that is gone: say the folder's name
            raise
        finally:
            os.close(fd)
    keep_name(path)


def check_folder(path: str | Path) -> None:
    """Raise UserError unless a file of that name could be made: try one beside it, and remove it again."""
    path = Path(os.path.abspath(path))
    with write_errors(path):
        temporary, fd = _locked(path, lambda new: os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        temporary.unlink()
        os.close(fd)


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def keep_name(path: str | Path) -> None:
    """fsync the folder of what has just got its name.

    Raises:
      UserError: it cannot be; the new file or folder stands there whole, but a power cut may undo its name.
    """
    path = Path(path)
    try:
        sync_folder(path.parent)
    except OSError as e:
        raise UserError(
            f"{path} is written, but its name may not survive a power cut: {reason_of(e)}; write it again"
        ) from e


def owner_of(path: str | Path, fd: int) -> bool:
    """Whether a locked file is still the one of that name: its last holder may have removed or renamed it."""
    try:
        there, here = os.stat(path, follow_symlinks=False), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _temporary(path: Path, kind: str = "tmp") -> Path:
    return path.parent / f".{path.name[:200]}.{secrets.token_hex(4)}.{kind}"


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _locked(path: Path, make: Any) -> tuple[Path, int]:
    """A new temporary file or folder beside the target, and its descriptor, which holds a lock until it is closed."""
    while True:
        new = _temporary(path)
        fd = make(new)
        with suppress(OSError):  # a file system without locks: nobody will take it for a dead writer's there either
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if owner_of(new, fd):
            return new, fd
        os.close(fd)  # cleared away between its making and its locking


def _clear_stale(path: Path, kind: str = "tmp") -> None:
    """Remove what dead writers of the same name have left."""
    pattern = re.compile(rf"\.{re.escape(path.name[:200])}\.[0-9a-f]{{8}}\.{kind}")
    with suppress(OSError):
        for name in [n for n in os.listdir(path.parent) if pattern.fullmatch(n)]:
            with suppress(OSError):
                _remove_if_dead(path.parent / name)


def _remove_if_dead(path: Path) -> None:
    found = path.lstat()
    if found.st_uid != os.geteuid() or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if owner_of(path, fd):
            _remove(path)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    """What is left of it, the next writer clears away."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move_onto(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    files = {f.name for f in new.iterdir()}
    kept = sorted(f.name for f in path.iterdir() if f.name not in files or f.is_dir())
    if kept:
        raise UserError(
            f"cannot write {path}: the folder exists and holds {kept[0]!r}, which would be lost; choose another name"
        )
    if _exchange(new, path):
        _remove(new)  # the old one, now
        return
    old = _temporary(path, "old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    if old.is_symlink():
        old.unlink()
    _clear_stale(path, "old")  # not before the new one is there


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as f:
        f.write(text.encode())
