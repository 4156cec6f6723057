"""A roofline: work done a second against work for each byte moved, under what the machine can do at most."""

from __future__ import annotations

import dataclasses

from qjax.report.figures.axes import logarithmic, plane
from qjax.report.figures.drawing import SLIM, Drawing, circle, line, path, text
from qjax.report.figures.front import NAMES
from qjax.report.figures.labels import place, shortened
from qjax.report.schema import Table

KEYS = ("flops", "bytes", "seconds", "peak_flops", "peak_bytes")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A program: operations for each byte, operations a second, and the roof of its machine."""

    name: str
    intensity: float
    rate: float
    peak_flops: float
    peak_bytes: float

    @property
    def roof(self) -> float:
        """Operations a second that the machine allows at this intensity."""
        return min(self.peak_flops, self.intensity * self.peak_bytes)


def measured(table: Table) -> list[Measured]:
    """The rows that have all numbers."""
    found = []
    for row in table.rows:
        numbers = [float(v) for key in KEYS if isinstance(v := row.get(key), int | float) and v > 0]
        if len(numbers) == len(KEYS):
            flops, moved, seconds, peak_flops, peak_bytes = numbers
            name = next((str(row[k]) for k in NAMES if isinstance(row.get(k), str)), "")
            found.append(Measured(name, flops / moved, flops / seconds, peak_flops, peak_bytes))
    return found


def draw(table: Table, width: float) -> Drawing | None:
    """The programs of a table under the roofs of their machines.

    Args:
      table: rows with operations, bytes moved, seconds, and operations and bytes a second that the machine can do.
      width: of the figure.
    """
    found = sorted(measured(table), key=lambda m: m.intensity)
    if not found:
        return None
    roofs = sorted({(m.peak_flops, m.peak_bytes) for m in found})
    ridges = [flops / moved for flops, moved in roofs]
    xs = [*(m.intensity for m in found), *ridges]
    low, high = min(xs) / 2, 2 * max(xs)
    ys = [*(m.rate for m in found), *(f for f, _ in roofs), *(min(f, low * b) for f, b in roofs)]
    height = 340.0 if width == SLIM else 460.0
    axes = plane(logarithmic("operations for each byte, flop/B", [low, high], 0.0),
                 logarithmic("operations a second, Gflop/s", [y / 1e9 for y in ys]), width, height)  # fmt: skip
    parts = list(axes.parts)
    for flops, moved in roofs:
        corners = [(x, min(flops, x * moved)) for x in (low, flops / moved, high)]
        parts.append(path("roof", [(axes.x.at(x), axes.y.at(y / 1e9)) for x, y in corners]))
    marks = [(axes.x.at(m.intensity), axes.y.at(m.rate / 1e9)) for m in found]
    texts = [shortened(m.name, 0.6 * axes.frame.width) for m in found]
    for m, mark, said, label in zip(found, marks, texts, place(marks, texts, axes.frame), strict=True):
        tip = (
            f"{m.name}: {m.intensity:.3g} flop/B, {m.rate / 1e9:.4g} Gflop/s, {100 * m.rate / m.roof:.0f} % of the roof"
        )
        parts.append(circle("other", *mark, 4.0, tip))
        if label is not None:
            parts += [line("leader", *mark, label.box.x, label.box.y + label.box.height / 2)] if label.far else []
            parts.append(text("name", label.box.x, label.box.y + 12, said, label.box.width, label.box))
    return Drawing(width, height, tuple(parts), "Roofline", "The line: what the machine can do at most.")
