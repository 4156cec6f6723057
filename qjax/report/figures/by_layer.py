"""A model's tensors by layer: bits of each layer, and the error of every kind of weight in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qjax.report.figures.axes import linear, plane, slots
from qjax.report.figures.drawing import SLIM, Drawing, by_panel, panel_width, rect, side_by_side, text
from qjax.report.figures.heat import heat
from qjax.report.figures.labels import Box, width_of
from qjax.report.schema import Cell, Table


def draw_bits(table: Table, width: float) -> Drawing | None:
    """A bar for each layer, all its tensors together, and for each matrix outside of them: bits per weight."""
    panels = {of: bars for of, rows in by_panel(table.rows).items() if len(bars := bits_of_layers(rows)) > 1}
    if not panels:
        return None
    wide = panel_width(len(panels), width)
    return side_by_side([_bars(of, bars, wide) for of, bars in panels.items()], width, "Bits by layer")


def bits_of_layers(rows: Iterable[Mapping[str, Cell]]) -> dict[str, float]:
    """Bits per weight of each layer, by rising number, and of what lies outside of them; a norm alone is left out."""
    size: dict[str, list[float]] = {}
    for row in rows:
        bits, total = row.get("bits"), row.get("bytes")
        if isinstance(bits, int | float) and isinstance(total, int | float) and bits:
            inside = isinstance(row.get("layer"), int | float)
            kept = size.setdefault(str(row["layer"]) if inside else str(row.get("kind", "")), [0.0, 0.0])
            kept[0] += 8.0 * total
            kept[1] += 8.0 * total / bits
    most = max((weights for _, weights in size.values()), default=0.0)
    bits_of = {name: stored / weights for name, (stored, weights) in size.items() if weights > most / 1000}
    names = sorted(bits_of, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    return {name: bits_of[name] for name in names}


def _bars(of: str, bars: Mapping[str, float], width: float) -> Drawing:
    height = 280.0 if width == SLIM else 320.0
    values = linear("bits per weight", [0.0, 1.12 * max(bars.values())], 0.0)
    axes = plane(slots("layer, and what lies outside of them", list(bars)), values, width, height)
    wide = axes.frame.width / len(bars)
    parts = list(axes.parts)
    for n, (name, bits) in enumerate(bars.items()):
        said, up = f"{bits:.2f}", axes.y.at(bits)
        box = Box(axes.frame.x + (n + 0.15) * wide, up, 0.7 * wide, axes.frame.y + axes.frame.height - up)
        parts.append(rect("bar", box, f"{name}: {bits:.3f} bits"))
        if width_of(said) < wide:
            parts.append(text("middle", axes.frame.x + (n + 0.5) * wide, up - 5, said))
    return Drawing(width, height, tuple(parts), of)


def draw_errors(table: Table, width: float) -> Drawing | None:
    """Layers across, kinds of weights down."""
    panels = {of: found for of, rows in by_panel(table.rows).items() if (found := _errors(rows))[0]}
    if not panels:
        return None
    wide = panel_width(len(panels), width)
    every = [error for cells, _ in panels.values() for error in cells.values()]
    ends, made = (min(every), max(every)), []
    for of, (cells, outside) in panels.items():
        kinds = list(dict.fromkeys(kind for _, kind in cells))
        caption = f"Outside of the layers: {', '.join(outside)}." if outside else ""
        made.append(heat(cells, "layer", "relative error of weights, %", kinds, wide, ends, of, caption=caption))
    return side_by_side(made, width, "Error by layer")


def _errors(rows: Iterable[Mapping[str, Cell]]) -> tuple[dict[tuple[int, str], float], list[str]]:
    """Errors in percent by (layer, kind), and those outside of the layers in words."""
    cells: dict[tuple[int, str], float] = {}
    outside = []
    for row in rows:
        error, layer, kind = row.get("relative_rmse"), row.get("layer"), row.get("kind")
        if isinstance(error, int | float) and isinstance(kind, str) and error:
            if isinstance(layer, int | float):
                cells[int(layer), kind] = 100.0 * error
            else:
                outside.append(f"{kind} {100 * error:.3g} %")
    return cells, outside
