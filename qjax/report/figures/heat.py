"""A heat map: a cell for each column and row, its number where there is room for it, and a key of what colours mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from qjax.report.figures.axes import plane, slots
from qjax.report.figures.drawing import Drawing, rect, text
from qjax.report.figures.labels import Box, width_of

CELL, KEY = 26.0, 28.0  # heights of a row, and of the key


def heat(
    cells: Mapping[tuple[int, str], float],
    across: str,
    down: str,
    rows: Sequence[str],
    width: float,
    ends: tuple[float, float],
    title: str,
    of: Callable[[float], float] = float,
    caption: str = "",
) -> Drawing:
    """A heat map of numbers by (column, row).

    Args:
      cells: the numbers; columns are whole numbers.
      across, down: titles of the axes, with units.
      rows: from top to bottom.
      width: of the figure.
      ends: the numbers of the palest and of the fullest colour: panels that share them can be compared.
      title, caption: of the figure.
      of: how the colour grows: `math.log10` where numbers span decades.
    """
    columns = sorted({column for column, _ in cells})
    height = CELL * len(rows) + 76 + KEY
    axes = plane(slots(across, [str(c) for c in columns]), slots(down, rows[::-1]), width, height - KEY)
    low, high = ends
    wide, tall = axes.frame.width / len(columns), axes.frame.height / len(rows)
    said = {at: number(value) for at, value in cells.items()}
    fits = max(map(width_of, said.values())) + 2 <= wide
    parts = list(axes.parts)
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            box = Box(axes.frame.x + c * wide, axes.frame.y + r * tall, wide - 1, tall - 1)
            value = cells.get((column, row))
            if value is None:
                parts.append(rect("hole", box))
                continue
            strength = (of(value) - of(low)) / ((of(high) - of(low)) or 1.0)
            parts.append(rect("heat", box, f"{row}, {column}: {value:.4g}", 0.04 + 0.96 * strength))
            if fits:
                parts.append(text("middle", box.x + wide / 2, box.y + tall / 2 + 4, said[column, row]))
    return Drawing(width, height, (*parts, *_key(low, high, axes.frame.x, height - KEY + 4)), title, caption)


def number(value: float) -> str:
    """Two or three figures, as short as they go."""
    digits = (
        0
        if value == 0 or abs(value) >= 100
        else max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9) - (abs(value) < 10))
    )
    return f"{value:.{digits}f}" if digits <= 4 else f"{value:.1e}"


def _key(low: float, high: float, left: float, top: float) -> list[str]:
    """The colours from the least number to the largest."""
    first, last = f"{low:.3g}", f"{high:.3g}"
    start = left + width_of(first) + 8
    boxes = [Box(start + 14.0 * n, top, 14.0, 12.0) for n in range(8)]
    swatches = [rect("heat", box, "", 0.04 + 0.96 * n / 7) for n, box in enumerate(boxes)]
    return [text("tick", left, top + 11, first), *swatches, text("tick", start + 14 * 8 + 8, top + 11, last)]
