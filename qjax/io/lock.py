"""One process at a time: a lock on a file, gone with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qjax.errors import UserError
from qjax.io.atomic import write_errors


class InUse(UserError):
    """Another process holds the lock."""


@contextmanager
def locked(path: str | Path, what: str) -> Iterator[None]:
    """Hold a lock while the body runs. The file stays, empty: who unlinks it may unlink another's.

    Args:
      path: the lock file, made where there is none.
      what: what the lock is for, in the message.

    Raises:
      InUse: another process holds it.
      UserError: the file cannot be made.
    """
    with write_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise InUse(f"{what} is in use by another process; wait until it ends, or name another place") from None
        yield
    finally:
        os.close(fd)
