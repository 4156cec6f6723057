"""Quantizations of the small model: within this process, or by `qjax quantize` in one that a kill may end."""

import contextlib
import itertools
import os
import signal
import sys
from pathlib import Path

import numpy as np

from qjax.pipeline import Calibration, quantize_file

CHANGES = ("open", "mkdir", "write", "pwrite", "posix_fallocate", "ftruncate", "fsync", "replace", "rename")
"""Calls that change a disk; `before_changes` sees them in one folder."""


def calibration():
    return Calibration(np.random.default_rng(7).integers(0, 320, (4, 16)).astype(np.int32), 1, 2, 0)


def quantized(model, out, **options):
    return quantize_file(model, out, "pure:Q4_0", **options)


def _within(folder, name, args) -> bool:
    if name == "open" and not args[1] & os.O_CREAT:
        return False
    path = os.readlink(f"/proc/self/fd/{args[0]}") if type(args[0]) is int else os.path.abspath(args[0])
    return path.startswith(os.fspath(folder))


@contextlib.contextmanager
def before_changes(folder, act):
    """Call act(number from 1, real function, args) before each change within a folder; it raises, kills or returns."""
    folder, numbers = os.path.realpath(folder), itertools.count(1)
    reals = {name: getattr(os, name) for name in CHANGES}

    def watched(name, real):
        def call(*args, **kwargs):
            if _within(folder, name, args):
                act(next(numbers), real, args)
            return real(*args, **kwargs)

        return call

    for name, real in reals.items():
        setattr(os, name, watched(name, real))
    try:
        yield
    finally:
        for name, real in reals.items():
            setattr(os, name, real)


def command(argv, folder, kill_at):
    """`qjax ARGV` that dies before its kill_at-th change within a folder, or in the middle of it if it writes bytes.

    Without kill_at the number of changes is left in FOLDER.changes.
    """
    from qjax.cli import main

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    count = 0

    def act(number, real, args):
        nonlocal count
        count = number
        if number == kill_at:
            if real.__name__ in ("write", "pwrite"):
                real(args[0], memoryview(args[1])[: len(args[1]) // 2], *args[2:])
            os.kill(os.getpid(), signal.SIGKILL)

    with before_changes(folder, act):
        status = main([str(a) for a in argv])
    if kill_at is None:
        Path(f"{folder}.changes").write_text(str(count))
    os._exit(status)
