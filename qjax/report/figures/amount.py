"""KL against the tokens of calibration text, a line for each recipe on each mix."""

from __future__ import annotations

from qjax.report.figures.axes import legend, logarithmic, plane, series_of
from qjax.report.figures.drawing import SERIES, SLIM, Drawing, circle, line, path
from qjax.report.schema import Table


def draw(table: Table, width: float) -> Drawing | None:
    """The lines of a table; None where no recipe was given two amounts of text.

    Args:
      table: rows with calibration_tokens, recipe, kl_mean and, where they are several, mix and kl_half_interval.
      width: of the figure.
    """
    lines = {name: points for name, points in _lines(table).items() if len(points) > 1}
    if not lines:
        return None
    every = [at for points in lines.values() for at in points]
    height = 320.0 if width == SLIM else 400.0
    reach = [end for _, kl, half in every for end in (max(kl - half, kl / 10), kl + half)]
    x = logarithmic("tokens of calibration text", [tokens for tokens, *_ in every])
    axes = plane(x, logarithmic("KL, nats a token", reach), width, height)
    parts = list(axes.parts)
    for n, (name, points) in enumerate(lines.items()):
        marks = [(axes.x.at(tokens), axes.y.at(kl)) for tokens, kl, _ in points]
        parts.append(path(series_of(n), marks))
        for (at, high), (tokens, kl, half) in zip(marks, points, strict=True):
            if half:
                ends = axes.y.at(max(kl - half, kl / 10)), axes.y.at(kl + half)
                parts.append(line("whisker", at, ends[0], at, ends[1]))
            parts.append(circle(f"series s{n % SERIES}", at, high, 3.5, f"{name}, {tokens:,.0f} tokens: {kl:.5f}"))
    if len(lines) > 1:
        keys, more = legend(list(lines), [series_of(n) for n in range(len(lines))], width, height)
        parts, height = [*parts, *keys], height + more
    return Drawing(width, height, tuple(parts), "KL against calibration text", "")


def _lines(table: Table) -> dict[str, list[tuple[float, float, float]]]:
    """(tokens, KL, half its interval) of each recipe, by rising tokens; one mix of several is named."""
    mixes = {row.get("mix") for row in table.rows}
    found: dict[str, dict[float, tuple[float, float, float]]] = {}
    for row in table.rows:
        tokens, kl, half = row.get("calibration_tokens"), row.get("kl_mean"), row.get("kl_half_interval")
        if not isinstance(tokens, int | float) or not isinstance(kl, int | float) or kl <= 0 or tokens <= 0:
            continue
        name = f"{row['mix']} {row['recipe']}" if len(mixes) > 1 else str(row["recipe"])
        half = float(half) if isinstance(half, int | float) else 0.0
        found.setdefault(name, {}).setdefault(float(tokens), (float(tokens), float(kl), half))
    return {name: [points[at] for at in sorted(points)] for name, points in found.items()}
