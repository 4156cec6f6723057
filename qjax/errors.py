"""The one exception that means: the input is wrong, not the program; and what exit status an exception stands for."""

import difflib
import errno
import signal
from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what the user gave: a file, a key, a name, a shape. Its message is one line that says what is
    wrong, where, and what would be right. The command line prints it and exits with 2."""


def check_word(key: str, value: str, words: Sequence[str]) -> None:
    """Raise UserError, with the nearest word, for a key whose value is none of the words."""
    if value not in words:
        near = difflib.get_close_matches(value, [w for w in words if w], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{key} must be {', '.join(w or 'empty' for w in words)}, got {value!r}{hint}")


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end (SIGTERM, SIGHUP); it unwinds as Ctrl-C does.

    Attributes:
      number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


# What the outside world does to a file is not a bug of this program.
_WORLD = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT,
    errno.EFBIG, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENOTEMPTY, errno.EXDEV,
}  # fmt: skip


def exit_status(error: BaseException) -> int:
    """2 for a user's mistake or the file system's refusal, 128 + its number for a signal (130: Ctrl-C), 1 for a bug."""
    if isinstance(error, Stopped):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return 130
    world = isinstance(error, OSError) and error.errno in _WORLD
    return 2 if world or isinstance(error, UserError) else 1
