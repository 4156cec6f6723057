"""Outliers of inputs, before and after changes of variables: layers down, groups of channels across."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qjax.report.figures.drawing import Drawing, by_panel, panel_width, side_by_side
from qjax.report.figures.heat import heat
from qjax.report.schema import Cell, Table


def draw(table: Table, width: float) -> Drawing | None:
    """A heat map for each change of variables that the rows are of.

    Args:
      table: rows with a layer, a group of channels, and the largest value in it over that of the median channel.
      width: of the figure.
    """
    maps = {of: cells for of, rows in by_panel(table.rows).items() if (cells := _cells(rows))}
    if not maps:
        return None
    wide, peaks = panel_width(len(maps), width), [peak for cells in maps.values() for peak in cells.values()]
    made = [_map(name, cells, wide, (min(peaks), max(peaks))) for name, cells in maps.items()]
    return side_by_side(made, width, "Outliers by layer and channel")


def _cells(rows: Iterable[Mapping[str, Cell]]) -> dict[tuple[int, str], float]:
    cells = {}
    for row in rows:
        layer, group, peak = row.get("layer"), row.get("group"), row.get("peak")
        if isinstance(layer, int) and isinstance(group, int) and isinstance(peak, int | float) and peak > 0:
            cells[group, str(layer)] = float(peak)
    return cells


def _map(name: str, cells: Mapping[tuple[int, str], float], width: float, ends: tuple[float, float]) -> Drawing:
    rows = sorted({layer for _, layer in cells}, key=int)
    across, down = "group of input channels", "layer; colour: largest |x| / median"
    return heat(cells, across, down, rows, width, ends, name, math.log10)
