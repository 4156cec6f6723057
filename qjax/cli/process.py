"""What a process owes to who started it: standard streams that stand, signals that end it as cleanly as Ctrl-C, memory
that goes back when it is free; and how it is told of others."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from qjax.errors import Stopped, UserError

JOIN_HELP = "several processes: HOST:PORT/PROCESSES/PROCESS of this one, or auto under a launcher that JAX knows"


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Standard output and error that take any text: what their encoding lacks is written as an escape.

    Raises:
      UserError: standard output is closed. A file that is opened later would get its number, and what is printed.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # so would standard error's
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise UserError("standard output is closed; send it to a file, or to /dev/null")
    changed = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper) and s.errors == "strict"]
    for stream in changed:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in changed:
            with contextlib.suppress(ValueError, OSError):  # closed, or full
                stream.reconfigure(errors="strict")


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped` in the main thread; where they are ignored (nohup), they stay so."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in wanted:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)


def one_heap() -> None:
    """Have all threads share one heap that keeps what is freed until it is handed back (`qjax.pipeline.heap`).

    glibc gives threads heaps of their own, in none of which the pieces of another's fit, and maps and unmaps what is
    larger than 128 kB: pages that the system clears anew for every product. From 16 MB on arrays stay maps of their
    own, for holes of a large model's many sizes seldom fit again (mallopt(3)). Settings of the environment win.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        arena_max, mmap_threshold, trim_threshold = -8, -3, -1
        mallopt(arena_max, 1)
        mallopt(mmap_threshold, 1 << 24)
        mallopt(trim_threshold, 1 << 30)


def drop_output() -> None:
    """Send what standard output still holds nowhere: its reader is gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
