"""Progress on standard error, with rate and time left; a line now and then where that is no terminal."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from qjax.cli.output import size
from qjax.terminal import bar


@contextlib.contextmanager
def count_bar(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over things that are counted; yields a function (done, of all)."""
    with bar(what) as update:

        def advance(done: int, total: int) -> None:
            speed = update(done, total, "")
            update(done, total, f"{speed:.3g} {unit}/s" if speed else "")

        yield advance


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over bytes; yields a function (item, bytes done, of all)."""
    with bar(what, size) as update:

        def advance(item: str, done: int, total: int) -> None:
            speed = update(done, total, item)
            update(done, total, f"{size(speed)}/s  {item}" if speed else item)

        yield advance


@contextlib.contextmanager
def steps_bar(what: str) -> Iterator[Callable[[Any], None]]:
    """A bar over the weights of a walk; yields what takes its `WeightDone`s and shows each weight's loss."""
    with bar(what) as update:

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
