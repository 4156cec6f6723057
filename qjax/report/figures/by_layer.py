"""A model's tensors by layer: bits of each layer, and the error of every kind of weight in it."""

from __future__ import annotations

from qjax.report.figures.axes import linear, plane, slots
from qjax.report.figures.drawing import SLIM, Drawing, rect, text
from qjax.report.figures.heat import heat
from qjax.report.figures.labels import Box, width_of
from qjax.report.schema import Table


def draw_bits(table: Table, width: float) -> Drawing | None:
    """A bar for each layer, all its tensors together, and for each matrix outside of them: bits per weight."""
    size: dict[str, list[float]] = {}
    for row in table.rows:
        bits, total = row.get("bits"), row.get("bytes")
        if not isinstance(bits, int | float) or not isinstance(total, int | float) or not bits:
            continue
        inside = isinstance(row.get("layer"), int | float)
        kept = size.setdefault(str(row["layer"]) if inside else str(row.get("kind", "")), [0.0, 0.0])
        kept[0] += 8.0 * total
        kept[1] += 8.0 * total / bits
    most = max((weights for _, weights in size.values()), default=0.0)
    bars = {name: sum8 / weights for name, (sum8, weights) in size.items() if weights > most / 1000}  # a norm is none
    if len(bars) < 2:
        return None
    names = sorted(bars, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    height = 280.0 if width == SLIM else 320.0
    top = max(bars.values())
    values = linear("bits per weight", [0.0, 1.12 * top], 0.0)
    axes = plane(slots("layer, and what lies outside of them", names), values, width, height)
    wide = axes.frame.width / len(names)
    parts = list(axes.parts)
    for n, name in enumerate(names):
        said, up = f"{bars[name]:.2f}", axes.y.at(bars[name])
        box = Box(axes.frame.x + (n + 0.15) * wide, up, 0.7 * wide, axes.frame.y + axes.frame.height - up)
        parts.append(rect("bar", box, f"{name}: {bars[name]:.3f} bits"))
        if width_of(said) < wide:
            parts.append(text("middle", axes.frame.x + (n + 0.5) * wide, up - 5, said))
    return Drawing(width, height, tuple(parts), "Bits by layer", "")


def draw_errors(table: Table, width: float) -> Drawing | None:
    """Layers across, kinds of weights down."""
    cells: dict[tuple[int, str], float] = {}
    outside = []
    for row in table.rows:
        error, layer, kind = row.get("relative_rmse"), row.get("layer"), row.get("kind")
        if not isinstance(error, int | float) or not isinstance(kind, str) or not error:
            continue
        if isinstance(layer, int | float):
            cells[int(layer), kind] = 100.0 * error
        else:
            outside.append(f"{kind} {100 * error:.3g} %")
    if not cells:
        return None
    rows = list(dict.fromkeys(kind for _, kind in cells))
    caption = f"Outside of the layers: {', '.join(outside)}." if outside else ""
    return heat(cells, "layer", "relative error of weights, %", rows, width, "Error by layer", caption=caption)
