"""Progress on standard error, with rate and time left; silent where that is no terminal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def count_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are counted; yields a function (done, of all)."""
    from rich.progress import MofNCompleteColumn, TextColumn

    with _bar(what, MofNCompleteColumn(), TextColumn("{task.fields[note]}")) as update:

        def advance(done: int, total: int) -> None:
            speed = update(done, total, "")
            update(done, total, f"{speed:.3g} {unit}/s" if speed else "")

        yield advance


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over bytes; yields a function (item, bytes done, of all)."""
    from rich.progress import DownloadColumn, TextColumn, TransferSpeedColumn

    columns = DownloadColumn(), TransferSpeedColumn(), TextColumn("{task.fields[note]}")
    with _bar(what, *columns) as update:
        yield lambda item, done, total: update(done, total, item) and None


@contextlib.contextmanager
def steps_bar(what: str) -> Iterator[Callable[[Any], None]]:
    """A bar over the weights of a walk; yields what takes its `Step`s and shows each weight's loss."""
    from rich.progress import MofNCompleteColumn, TextColumn

    with _bar(what, MofNCompleteColumn(), TextColumn("{task.fields[note]}")) as update:

        def show(step: Any) -> None:
            line = step.report
            loss = "" if line is None or line.loss is None else f"  loss {line.first_loss:.3g} -> {line.loss:.3g}"
            update(step.done, step.total, f"{step.path}{loss}")

        yield show


@contextlib.contextmanager
def in_turn(*bars: contextlib.AbstractContextManager[Callable[..., Any]]) -> Iterator[tuple[Callable[..., Any], ...]]:
    """The functions of several bars of which one is drawn at a time: from its first news until another has news."""
    with contextlib.ExitStack() as stack:
        drawn: dict[int, Callable[..., Any]] = {}

        def news(n: int, *args: Any) -> None:
            if n not in drawn:
                stack.close()
                drawn[n] = stack.enter_context(bars[n])
            drawn[n](*args)

        yield tuple(functools.partial(news, n) for n in range(len(bars)))


@contextlib.contextmanager
def _bar(what, *columns):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(what, total=None, note="")

        def update(done: int, total: int, note: str) -> float | None:
            bar.update(task, completed=done, total=total, note=note)
            return bar.tasks[0].speed

        yield update
