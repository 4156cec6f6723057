"""What was predicted against what was measured: a point a model, and the line where both agree."""

from __future__ import annotations

import math
from statistics import correlation

from qjax.report.figures.axes import logarithmic, plane
from qjax.report.figures.drawing import SLIM, Drawing, circle, path
from qjax.report.figures.front import NAMES
from qjax.report.schema import Table


def pairs(table: Table) -> list[tuple[str, float, float]]:
    """(name, predicted, measured) of the rows that have both, above zero."""
    found = []
    for row in table.rows:
        x, y = row.get("predicted"), row.get("kl")
        if isinstance(x, int | float) and isinstance(y, int | float) and x > 0 and y > 0:
            found.append((next((str(row[k]) for k in NAMES if isinstance(row.get(k), str)), ""), float(x), float(y)))
    return found


def draw(table: Table, width: float) -> Drawing | None:
    """KL as the sum of its parts promised it, and as it is.

    Args:
      table: rows with `predicted` and `kl`, in nats.
      width: of the figure.
    """
    found = pairs(table)
    if len({x for _, x, _ in found}) < 3:
        return None
    both = [v for _, x, y in found for v in (x, y)]
    height = 340.0 if width == SLIM else 460.0
    axes = plane(
        logarithmic("sum of its parts, nats", both), logarithmic("KL measured, nats a token", both), width, height
    )
    ends = min(both), max(both)
    parts = [*axes.parts, path("roof", [(axes.x.at(v), axes.y.at(v)) for v in ends])]
    parts += [
        circle("other", axes.x.at(x), axes.y.at(y), 4.0, f"{name}: {x:.4g} promised, {y:.4g}") for name, x, y in found
    ]
    r = correlation([math.log(x) for _, x, _ in found], [math.log(y) for _, _, y in found])
    said = f"{len(found)} models; the line: both agree. Correlation of the logarithms {r:.3f}."
    return Drawing(width, height, tuple(parts), "KL and the sum of its parts", said)
