"""Weights before and after: rounding, a rotation, training; and on the grid of their own blocks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from qjax.report.figures.axes import legend, linear, plane
from qjax.report.figures.drawing import SLIM, Drawing, by_panel, panel_width, path, side_by_side
from qjax.report.schema import Cell, Table

TITLES = {
    "weight": ("weight", "Weights before and after"),
    "position": ("position between the first and the last level of the weight's block", "Weights on the grid"),
}


def draw(table: Table, width: float, at: str) -> Drawing | None:
    """A histogram for each weight that the rows are of.

    Args:
      table: rows of bins: the middle, the share of weights in it before, and maybe after.
      width: of the figure.
      at: "weight" or "position": the key of the middle.
    """
    binned = [row for row in table.rows if isinstance(row.get(at), int | float)]
    whole = [row for row in binned if isinstance(row.get("before"), int | float)]
    panels = {of: rows for of, rows in by_panel(whole).items() if len(rows) > 1}
    if not panels:
        return None
    wide = panel_width(len(panels), width)
    made = [_panel(name, rows, wide, at) for name, rows in panels.items()]
    return side_by_side(made, width, TITLES[at][1], "A bin that towers over the others is cut off.")


DRAW = {at: functools.partial(draw, at=at) for at in TITLES}


def _panel(name: str, rows: Sequence[Mapping[str, Cell]], width: float, at: str) -> Drawing:
    rows = sorted(rows, key=lambda row: _number(row, at))
    middles, before = [_number(row, at) for row in rows], [_number(row, "before") for row in rows]
    after = [_number(row, "after") for row in rows if isinstance(row.get("after"), int | float)]
    after = after if len(after) == len(rows) else []
    half = (middles[1] - middles[0]) / 2
    top = min(max([*before, *after]), 2.5 * max(before))  # the zeros of a coarse grid tower
    height = 250.0 if width == SLIM else 290.0
    title = TITLES[at][0] if width != SLIM or at == "weight" else "position between a block's outer levels"
    axes = plane(linear(title, [middles[0] - half, middles[-1] + half], 0.0),
                 linear("share of weights, %", [0.0, 104 * top], 0.0), width, height)  # fmt: skip

    def steps(shares: Sequence[float]) -> list[tuple[float, float]]:
        ends = [(m + side * half, 100 * min(s, top)) for m, s in zip(middles, shares, strict=True) for side in (-1, 1)]
        return [(axes.x.at(x), axes.y.at(y)) for x, y in ends]

    foot = axes.frame.y + axes.frame.height
    parts = list(axes.parts)
    if after:
        closed = steps(after)
        parts.append(path("area", [(closed[0][0], foot), *closed, (closed[-1][0], foot)]))
    parts.append(path("outline", steps(before)))
    names, kinds = (["before", "after"], ["outline", "series s1"]) if after else (["weights"], ["outline"])
    keys, high = legend(names, kinds, width, height)
    return Drawing(width, height + high, (*parts, *keys), name)


def _number(row: Mapping[str, Cell], key: str) -> float:
    value = row[key]
    assert isinstance(value, int | float)
    return float(value)
