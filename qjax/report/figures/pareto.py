"""KL or perplexity against the bits of the whole model: whiskers, names, and the line of those worth their bits."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qjax.report.figures.axes import linear, logarithmic, plane
from qjax.report.figures.drawing import SLIM, Drawing, circle, line, path, text
from qjax.report.figures.front import TITLES, Point, drawn, front, points
from qjax.report.figures.labels import Label, place, shortened
from qjax.report.schema import Table

LONGEST = 290.0  # pixels of a label; the tooltip has all of it


def draw(table: Table, width: float, measure: str) -> Drawing | None:
    """The figure of a table; None where fewer than two of its rows have a place on it.

    Args:
      table: rows with the bits of the whole model and a measure.
      width: of the figure.
      measure: "kl" or "perplexity".
    """
    kept, left = drawn(points([table], measure))
    if len(kept) < 2:
        return None
    best = front(kept)
    order = sorted(range(len(kept)), key=lambda n: (not best[n], kept[n].bits, kept[n].loss))  # the front chooses first
    kept, best = [kept[n] for n in order], [best[n] for n in order]
    bits = linear("bits per weight, whole model", [p.bits for p in kept])
    loss = logarithmic(TITLES[measure], [v for p in kept for v in _reach(p)])
    height = 400.0 if width == SLIM else 560.0
    axes = plane(bits, loss, width, height)
    marks = [(axes.x.at(p.bits), axes.y.at(p.loss)) for p in kept]
    longest = min(LONGEST, 0.6 * axes.frame.width)
    shown = [on or width != SLIM for on in best]  # a phone has room for the names on the line alone
    texts = [shortened(p.name, longest) if show else "" for p, show in zip(kept, shown, strict=True)]
    labels = place(marks, texts, axes.frame)
    parts = [*axes.parts, path("front", [mark for mark, on in zip(marks, best, strict=True) if on])]
    for point, mark, on in zip(kept, marks, best, strict=True):
        low, high = map(axes.y.at, _reach(point))
        parts += [line("whisker", mark[0], low, mark[0], high)] if point.half else []
        parts.append(circle("best" if on else "other", *mark, 4.0, _said(point)))
    named = [_label(*each) for each in zip(texts, marks, labels, best, strict=True) if each[0]]
    caption = _caption(left, shown.count(False), named.count(""))
    return Drawing(width, height, (*parts, *named), f"{SHORT[measure]} against bits", caption)


SHORT = {"kl": "KL", "perplexity": "Perplexity"}
DRAW = {measure: functools.partial(draw, measure=measure) for measure in TITLES}


def _reach(point: Point) -> tuple[float, float]:
    """The ends of its whisker; one that reaches zero ends at a tenth, for the axis is logarithmic."""
    return max(point.loss - point.half, point.loss / 10), point.loss + point.half


def _said(point: Point) -> str:
    return f"{point.name}: {point.bits:.3f} bits, {point.loss:.6g}" + (f" ± {point.half:.2g}" if point.half else "")


def _label(said: str, mark: tuple[float, float], label: Label | None, on: bool) -> str:
    if label is None:
        return ""
    box, leader = label.box, ""
    if label.far:
        leader = line("leader", *mark, min(max(mark[0], box.x), box.x + box.width),
                      min(max(mark[1], box.y), box.y + box.height))  # fmt: skip
    return leader + text("name best" if on else "name", box.x, box.y + 12, said, box.width, box)


def _caption(left: Sequence[Point], nameless: int, hidden: int) -> str:
    notes = ["On the line: no other has as few bits and as little loss."]
    if left:
        said = ", ".join(f"{p.name} ({p.bits:g} bits, {p.loss:.6g})" for p in left)
        notes.append(f"Not on the axes: {said}.")
    if nameless:
        notes.append("The table has the others' names.")
    if hidden:
        notes.append(f"{hidden} without room for a name; point at them.")
    return " ".join(notes)
