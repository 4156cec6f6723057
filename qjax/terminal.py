"""What goes to people's terminals: text that cannot steer them, lines, and bars.

File names, metadata and tokens come from files that anyone may have made. A terminal obeys some of their characters
(ESC sequences rename its window, hide text, type answers), so everything printed from a file goes through `shown`.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LINES_EVERY = 10.0  # seconds, where there is no terminal to draw a bar on

# C0 and C1 controls but tab and newline; what turns the direction of a line; lone surrogates, which no stream takes.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: Any) -> str:
    r"""Text as a terminal may have it: control characters become escapes, tabs and newlines stay.

    >>> shown("\x1b[31mred")
    '\\x1b[31mred'
    """
    return _STEERING.sub(lambda m: m[0].encode("unicode_escape").decode(), str(text))


def say(text: Any) -> None:
    """One line on standard error."""
    print(shown(" ".join(str(text).split())), file=sys.stderr, flush=True)


@contextmanager
def bar(
    what: str, count: Callable[[int], str] = str, *, done: int = 0, total: int | None = None
) -> Iterator[Callable[[int, int, str], float | None]]:
    """A bar with what is done of all and the time left; a line now and then where standard error is no terminal.

    Args:
      what: what is counted.
      count: how a number of them is written.
      done, total: where it begins, and of how many, where that is known.

    Yields: a function (done, total, note) -> the speed in things a second, where it is known.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)

    def counted(done: int, total: int | None) -> str:
        return "" if total is None else f"{count(done)}/{count(total)}"

    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[counted]}", markup=False),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        console=console, transient=True, disable=not console.is_terminal,
    ) as drawn:  # fmt: skip
        task = drawn.add_task(shown(what), total=total, completed=done, note="", counted=counted(done, total))
        first, begun, last = done, time.monotonic(), time.monotonic()

        def update(done: int, total: int, note: str = "") -> float | None:
            nonlocal last
            note = shown(note)
            drawn.update(task, completed=done, total=total, note=note, counted=counted(done, total))
            now = time.monotonic()
            if not console.is_terminal and now - last >= LINES_EVERY:
                last = now
                left = (now - begun) * (total - done) / max(done - first, 1)
                times = f"{_clock(now - begun)} gone, {_clock(left)} left"
                say(", ".join(filter(None, (f"{what}: {counted(done, total)}", note, times))))
            return drawn.tasks[0].speed

        yield update


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
