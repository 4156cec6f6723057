"""KL of single tokens: how large it is at most for a share of them, with room for the tail, where models differ."""

from __future__ import annotations

import math

from qjax.report.figures.axes import Span, legend, logarithmic, plane, series_of
from qjax.report.figures.drawing import SLIM, Drawing, path
from qjax.report.schema import Table

SHARES = ((0.0, "0"), (0.5, "50"), (0.9, "90"), (0.99, "99"), (0.999, "99.9"), (0.9999, "99.99"))


def draw(table: Table, width: float) -> Drawing | None:
    """A line for each model: its quantiles.

    Args:
      table: rows with a quantile below 1 and the KL that so many tokens do not exceed.
      width: of the figure.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in table.rows:
        share, kl = row.get("quantile"), row.get("kl")
        if isinstance(share, int | float) and isinstance(kl, int | float) and 0 <= share < 1 and kl > 0:
            lines.setdefault(str(row.get("name", "")), []).append((float(share), float(kl)))
    lines = {name: sorted(line) for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    height = 320.0 if width == SLIM else 400.0
    high = max(_tail(share) for line in lines.values() for share, _ in line)
    across = Span("share of tokens, %", 0.0, 1.02 * high, _tail,
                  lambda most: [at for at in SHARES if _tail(at[0]) <= high][:: 1 if most > 4 else 2])  # fmt: skip
    values = [kl for line in lines.values() for _, kl in line]
    axes = plane(across, logarithmic("KL of a token at most, nats", values), width, height)
    parts = list(axes.parts)
    for n, line in enumerate(lines.values()):
        parts.append(path(series_of(n), [(axes.x.at(share), axes.y.at(kl)) for share, kl in line]))
    keys, more = legend(list(lines), [series_of(n) for n in range(len(lines))], width, height)
    return Drawing(width, height + more, (*parts, *keys), "KL by token", "Half of the axis is for the last percents.")


def _tail(share: float) -> float:
    """How far right a share stands: a step of one for each nine."""
    return -math.log10(1.0 - share)
