"""The axes that figures share: values to pixels, round ticks that have room, titles with units, legends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from qjax.report.figures.drawing import SERIES, line, rect, text
from qjax.report.figures.labels import Box, shortened, width_of

TOP, FOOT, RIGHT = 26.0, 50.0, 18.0  # room for the titles, and for half of the last tick


@dataclasses.dataclass(frozen=True)
class Span:
    """What an axis says, before it has a place.

    Attributes:
      title: with the unit.
      low, high: its ends, after `of`.
      of: what values go through: `math.log10` on a logarithmic axis.
      ticks: (how many there is room for) -> values and their texts.
      lines: whether ticks go across the figure.
    """

    title: str
    low: float
    high: float
    of: Callable[[float], float]
    ticks: Callable[[int], list[tuple[float, str]]]
    lines: bool = True


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values over pixels: from a start, some length, negative for upwards."""

    span: Span
    start: float
    length: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (self.span.of(value) - self.span.low) / (self.span.high - self.span.low) * self.length


@dataclasses.dataclass(frozen=True)
class Plane:
    """Two scales, the frame they span, and the elements that show them."""

    frame: Box
    x: Scale
    y: Scale
    parts: tuple[str, ...]


def linear(title: str, values: Sequence[float], share: float = 0.06) -> Span:
    """An even axis with a share of its range free at both ends."""
    low, high = _widened(min(values), max(values), share)
    return Span(title, low, high, float, lambda most: [(v, f"{v:g}") for v in linear_ticks(low, high, most)])


def logarithmic(title: str, values: Sequence[float], share: float = 0.08) -> Span:
    """A logarithmic axis of positive values."""
    low, high = _widened(math.log10(min(values)), math.log10(max(values)), share)
    return Span(title, low, high, math.log10, lambda most: [(v, f"{v:g}") for v in log_ticks(low, high, most)])


def spread(title: str, values: Sequence[float]) -> Span:
    """Logarithmic where values are positive and span a factor of five, else linear."""
    wide = min(values) > 0 and max(values) > 5 * min(values)
    return (logarithmic if wide else linear)(title, values)


def slots(title: str, names: Sequence[str]) -> Span:
    """A slot for each name; the slot n lies between n and n + 1."""

    def ticks(most: int) -> list[tuple[float, str]]:
        every = -(-len(names) // max(most, 1))
        return [(n + 0.5, name) for n, name in enumerate(names) if n % every == 0]

    return Span(title, 0.0, float(len(names)), float, ticks, lines=False)


def plane(x: Span, y: Span, width: float, height: float) -> Plane:
    """Axes in a figure of some width and height; y's title stands above, where it is read without turning the head."""
    high = height - TOP - FOOT
    side = y.ticks(int(high / 18) if not y.lines else max(2, int(high / 40)))
    left = 14 + max((width_of(said) for _, said in side), default=0)
    frame = Box(left, TOP, width - left - RIGHT, high)
    widest = max((width_of(said) for _, said in x.ticks(int(frame.width / 40) if x.lines else 1_000)), default=1)
    foot = x.ticks(max(2, int(frame.width / max(widest + 12, 60.0 if x.lines else 0.0))))
    across, up = Scale(x, frame.x, frame.width), Scale(y, frame.y + high, -high)
    bottom = frame.y + frame.height
    parts = [rect("frame", frame)]
    for value, said in foot:
        at = across.at(value)
        parts += [line("grid", at, frame.y, at, bottom)] if x.lines else []
        parts.append(text("tick middle", at, bottom + 20, said))
    for value, said in side:
        at = up.at(value)
        parts += [line("grid", frame.x, at, frame.x + frame.width, at)] if y.lines else []
        parts.append(text("tick end", frame.x - 6, at + 4, said))
    parts.append(text("axis middle", frame.x + frame.width / 2, height - 10, x.title))
    parts.append(text("axis", 2.0, 14.0, y.title))
    return Plane(frame, across, up, tuple(parts))


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values between two, about as many as there is room for."""
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((n * power for n in (1, 2, 5) if n * power >= raw * 0.999), 10 * power)
    digits = 2 - math.floor(math.log10(step))
    return [round(n * step, digits) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int = 10) -> list[float]:
    """1, 2, 5 times powers of ten between two logarithms; powers alone where those are too many, and round values where
    they are too few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m * 10.0**p) <= high]
    if len(ticks) < 3:
        return [v for v in linear_ticks(10**low, 10**high, most) if v > 0]
    if len(ticks) <= max(most, 3):
        return ticks
    tens = [10.0**p for p in powers if low <= p <= high]
    return tens[:: -(-len(tens) // max(most, 2))] if len(tens) >= 2 else ticks[::2]


def series_of(number: int) -> str:
    """The classes of the line with a number: its colour, and dashes once all colours were used."""
    return f"series s{number % SERIES}" + (f" dash{number // SERIES % 3}" if number >= SERIES else "")


def legend(names: Sequence[str], kinds: Sequence[str], width: float, top: float) -> tuple[list[str], float]:
    """Samples of lines with their names, in columns. Returns its elements and its height."""
    said = [shortened(name, width - 40) for name in names]
    column = max(map(width_of, said)) + 42
    across = max(1, int(width / column))
    parts = []
    for n, (name, kind) in enumerate(zip(said, kinds, strict=True)):
        x, y = 4 + n % across * column, top + 18.0 * (n // across)
        parts += [line(kind, x, y + 8, x + 22, y + 8), text("tick", x + 28, y + 12, name, width_of(name))]
    return parts, 18.0 * -(-len(names) // across) + 6


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    if high - low > 1e-9 * abs(high):
        return low - share * (high - low), high + share * (high - low)
    return low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1)
