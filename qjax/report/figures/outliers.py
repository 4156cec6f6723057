"""Outliers of inputs, before and after changes of variables: layers down, groups of channels across."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qjax.report.figures.drawing import Drawing, panel_width, side_by_side
from qjax.report.figures.heat import heat
from qjax.report.schema import Table


def draw(table: Table, width: float) -> Drawing | None:
    """A heat map for each change of variables that the rows are of.

    Args:
      table: rows with a layer, a group of channels, and the largest value in it over that of the median channel.
      width: of the figure.
    """
    maps: dict[str, dict[tuple[int, str], float]] = {}
    for row in table.rows:
        layer, group, peak = row.get("layer"), row.get("group"), row.get("peak")
        if isinstance(layer, int) and isinstance(group, int) and isinstance(peak, int | float) and peak > 0:
            maps.setdefault(str(row.get("of", "")), {})[group, str(layer)] = float(peak)
    if not maps:
        return None
    wide = panel_width(len(maps), width)
    made = [_map(name, cells, wide) for name, cells in maps.items()]
    return side_by_side(
        made, width, "Outliers by layer and channel", "Each map has its own colours; the key says them."
    )


def _map(name: str, cells: Mapping[tuple[int, str], float], width: float) -> Drawing:
    rows = sorted({layer for _, layer in cells}, key=int)
    return heat(cells, "group of input channels", "layer; colour: largest |x| / median", rows, width, name, math.log10)
