"""Numbers over the steps of training, a line for each arm: loss, and how far scales have moved."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qjax.report.figures.axes import legend, linear, plane, series_of, spread
from qjax.report.figures.drawing import SERIES, SLIM, Drawing, circle, path
from qjax.report.schema import Table

NAMES = ("name", "arm", "method")
# key: (title of the axis, title, what else is drawn as circles, what a reader must know)
KINDS = {
    "loss": ("loss, nats a token", "Training", "heldout", "Lines: training. Circles: held out."),
    "scale_drift": ("root mean square of ln(scale / its start)", "Scale drift", "", ""),
}


def draw(table: Table, width: float, key: str) -> Drawing | None:
    """The lines of a table's arms; None where none has two points.

    Args:
      table: rows with a step and the number.
      width: of the figure.
      key: of KINDS.
    """
    lines, points = _lines(table, key), _lines(table, KINDS[key][2])
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    title, head, extra, note = KINDS[key]
    points = {name: line for name, line in points.items() if name in lines}
    every = [at for line in [*lines.values(), *points.values()] for at in line]
    height = 320.0 if width == SLIM else 400.0
    axes = plane(linear("step", [x for x, _ in every], 0.02), spread(title, [y for _, y in every]), width, height)
    parts = list(axes.parts)
    for n, (name, line) in enumerate(lines.items()):
        parts.append(path(series_of(n), [(axes.x.at(x), axes.y.at(y)) for x, y in line]))
        for x, y in points.get(name, []):
            parts.append(
                circle(f"series s{n % SERIES}", axes.x.at(x), axes.y.at(y), 3.5, f"{name} {extra} {x:g}: {y:.4f}")
            )
    if len(lines) > 1:
        keys, high = legend(list(lines), [series_of(n) for n in range(len(lines))], width, height)
        parts, height = [*parts, *keys], height + high
    return Drawing(width, height, tuple(parts), head, note if points else "")


DRAW = {key: functools.partial(draw, key=key) for key in KINDS}


def _lines(table: Table, key: str) -> dict[str, Sequence[tuple[float, float]]]:
    """(step, number) of each arm, by rising steps."""
    by = next((c.key for c in table.columns if c.key in NAMES and c.digits is None), "")
    found: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float):
            found.setdefault(str(row.get(by, "")), []).append((float(step), float(value)))
    return {name: sorted(line) for name, line in found.items()}
