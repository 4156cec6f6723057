"""Which models are worth their bits: KL or perplexity against the bits of the whole model, and the Pareto front."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from qjax.evaluate.equal_bits import on_front
from qjax.report.schema import Cell, Column, Table

BITS = "whole_bits"
MEASURES = {"kl": ("kl", "kl_mean"), "perplexity": ("perplexity",)}
TITLES = {"kl": "KL to the float model, nats a token", "perplexity": "perplexity"}
NAMES = ("name", "method", "recipe", "mix", "format")
FLOAT_BITS = 32.0


@dataclasses.dataclass(frozen=True)
class Point:
    """A model: its bits, its loss, half its interval (0 where there is none), its name."""

    bits: float
    loss: float
    half: float
    name: str


def points(tables: Iterable[Table], measure: str) -> list[Point]:
    """The points of all rows that have bits and a measure.

    Args:
      tables: of any results.
      measure: "kl" or "perplexity".
    """
    found = []
    for table in tables:
        intervals = {c.key: c.interval for c in table.columns if c.digits is not None}
        key = next((k for k in MEASURES[measure] if k in intervals), None)
        if key is None or BITS not in intervals:
            continue
        for row in table.rows:
            bits, loss, half = row.get(BITS), row.get(key), row.get(intervals[key] or "")
            if isinstance(bits, int | float) and isinstance(loss, int | float):
                name = next((row[k] for k in NAMES if isinstance(row.get(k), str)), "")
                found.append(
                    Point(float(bits), float(loss), float(half) if isinstance(half, int | float) else 0.0, str(name))
                )
    return found


def front(found: Sequence[Point]) -> list[bool]:
    """Which points no other beats, see `on_front`."""
    return on_front([(p.bits, p.loss) for p in found])


def drawn(found: Iterable[Point]) -> tuple[list[Point], list[Point]]:
    """(points with a place on the axes, those without: float models, and losses of zero, which have no logarithm)."""
    kept: list[Point] = []
    left: list[Point] = []
    for point in found:
        (kept if point.bits < FLOAT_BITS and point.loss > 0 else left).append(point)
    return kept, left


def together(parts: Iterable[tuple[str, Table | None]], measure: str) -> Table:
    """One table of several results' points; a name that two results have gets the result's title behind it.

    Args:
      parts: (title, table) of each result.
      measure: "kl" or "perplexity".
    """
    found = [(title, point) for title, table in parts if table is not None for point in points([table], measure)]
    titles: dict[str, set[str]] = {}
    for title, point in found:
        titles.setdefault(point.name, set()).add(title)
    key = MEASURES[measure][0]
    rows: list[dict[str, Cell]] = []
    for title, p in found:
        name = p.name if len(titles[p.name]) == 1 else f"{p.name} ({title})"
        rows.append({"name": name, BITS: p.bits, key: p.loss, "half": p.half})
    columns = (Column("name", "name"), Column(BITS, "whole model", "bits", 3), Column(key, key, "", 6, "half"))
    return Table("all", columns, tuple(rows))
