"""KL against the bits of the layers, a line for each family of formats through those of it that are worth their bits.

Between two of them a line is straight where the logarithm of KL is, as evaluate/equal_bits.py reads it.
"""

from __future__ import annotations

from qjax.report.figures.axes import legend, linear, logarithmic, plane, series_of
from qjax.report.figures.drawing import SERIES, SLIM, Drawing, circle, line, path
from qjax.report.figures.front import NAMES, Point, front
from qjax.report.schema import Table


def draw(table: Table, width: float) -> Drawing | None:
    """The lines of a table; None where no family has two members.

    Args:
      table: rows with family, layer_bits, kl and, where they are several texts, kl_half_interval.
      width: of the figure.
    """
    families = _families(table)
    if not any(len(found) > 1 for found in families.values()):
        return None
    every = [p for found in families.values() for p in found]
    height = 360.0 if width == SLIM else 480.0
    reach = [end for p in every for end in (max(p.loss - p.half, p.loss / 10), p.loss + p.half)]
    bits = linear("bits per weight of the layers", [p.bits for p in every])
    axes = plane(bits, logarithmic("KL to the float model, nats a token", reach), width, height)
    parts = list(axes.parts)
    for n, found in enumerate(families.values()):
        best = sorted((p.bits, p.loss) for p, on in zip(found, front(found), strict=True) if on)
        parts.append(path(series_of(n), [(axes.x.at(b), axes.y.at(kl)) for b, kl in best]))
        for p in found:
            x, y = axes.x.at(p.bits), axes.y.at(p.loss)
            if p.half:
                ends = axes.y.at(max(p.loss - p.half, p.loss / 10)), axes.y.at(p.loss + p.half)
                parts.append(line("whisker", x, ends[0], x, ends[1]))
            parts.append(circle(f"series s{n % SERIES}", x, y, 3.5, f"{p.name}: {p.bits:.3f} bits, {p.loss:.5g}"))
    keys, more = legend(list(families), [series_of(n) for n in range(len(families))], width, height)
    said = "On a line: no other of the family has as few bits and as little loss."
    return Drawing(width, height + more, (*parts, *keys), "KL against bits, by family of formats", said)


def _families(table: Table) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for row in table.rows:
        family, bits, kl, half = (row.get(k) for k in ("family", "layer_bits", "kl", "kl_half_interval"))
        if not isinstance(family, str) or not isinstance(bits, int | float) or not isinstance(kl, int | float):
            continue
        if kl > 0:
            name = next((str(row[k]) for k in NAMES if isinstance(row.get(k), str)), "")
            half = float(half) if isinstance(half, int | float) else 0.0
            found.setdefault(family, []).append(Point(float(bits), float(kl), half, name))
    return found
