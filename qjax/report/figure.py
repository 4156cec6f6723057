"""The Pareto figure as SVG, written by hand: a log axis, whiskers, labels; colours are the page's CSS variables."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

from qjax.report.labels import Box, Label, place
from qjax.report.pareto import TITLES, Point, drawn, front

WIDE, HIGH = 900, 560
FRAME = Box(72.0, 16.0, 812.0, 488.0)
LONGEST = 44  # letters of a label; the tooltip has them all


def svg(found: Sequence[Point], measure: str) -> str:
    """The figure of points, "" where fewer than two have a place on it.

    Args:
      found: see `qjax.report.pareto.points`.
      measure: "kl" or "perplexity", for the axis's title.
    """
    kept, left = drawn(found)
    if len(kept) < 2:
        return ""
    best = front(kept)
    order = sorted(range(len(kept)), key=lambda n: (not best[n], kept[n].bits, kept[n].loss))  # the front chooses first
    kept, best = [kept[n] for n in order], [best[n] for n in order]
    x = _scale([p.bits for p in kept], 0.06, FRAME.x, FRAME.width)
    y = _scale([math.log10(v) for p in kept for v in _reach(p)], 0.08, FRAME.y + FRAME.height, -FRAME.height)
    marks = [(x.at(p.bits), y.at(math.log10(p.loss))) for p in kept]
    texts = [p.name if len(p.name) <= LONGEST else p.name[: LONGEST - 1] + "…" for p in kept]
    labels = place(marks, texts, FRAME)
    steps = " ".join(f"{across:.1f},{down:.1f}" for (across, down), on in zip(marks, best, strict=True) if on)
    parts = [*_axes(x, y, TITLES[measure]), f'<polyline class=front points="{steps}"/>']
    for point, mark, on, text, label in zip(kept, marks, best, texts, labels, strict=True):
        ends = [y.at(math.log10(v)) for v in _reach(point)]
        parts += [_mark(point, mark, ends, on), _label(text, mark, label, on)]
    name = f"{TITLES[measure]} against bits per weight of the whole model"
    picture = f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    return f"<figure><div class=wide>{picture}</div><figcaption>{_caption(left, labels)}</figcaption></figure>"


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values from low to high over pixels: from a start, some length, negative for upwards."""

    low: float
    high: float
    start: float
    length: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * self.length


def linear_ticks(low: float, high: float) -> list[float]:
    """Round values between two, about five of them."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((n * power for n in (1, 2, 5) if n * power >= raw), 10 * power)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between two logarithms; round values where those are too few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= math.log10(m * 10.0**p) <= high]
    return ticks if len(ticks) >= 3 else [v for v in linear_ticks(10**low, 10**high) if v > 0]


def _scale(values: Sequence[float], share: float, start: float, length: float) -> Scale:
    """The scale of values with a share of their range free at both ends."""
    low, high = min(values), max(values)
    more = (high - low) * share or 0.1
    return Scale(low - more, high + more, start, length)


def _axes(x: Scale, y: Scale, title: str) -> list[str]:
    middle, centre = FRAME.x + FRAME.width / 2, FRAME.y + FRAME.height / 2
    return [
        f'<rect class=frame x="{FRAME.x}" y="{FRAME.y}" width="{FRAME.width}" height="{FRAME.height}"/>',
        *(_tick_x(x.at(v), f"{v:g}") for v in linear_ticks(x.low, x.high)),
        *(_tick_y(y.at(math.log10(v)), f"{v:g}") for v in log_ticks(y.low, y.high)),
        f'<text class=axis x="{middle}" y="{HIGH - 12}">bits per weight, whole model</text>',
        f'<text class=axis transform="translate(18 {centre}) rotate(-90)">{title}</text>',
    ]


def _reach(point: Point) -> tuple[float, float]:
    """The ends of its whisker; one that reaches zero ends at a tenth, for the axis is logarithmic."""
    return max(point.loss - point.half, point.loss / 10), point.loss + point.half


def _mark(point: Point, mark: tuple[float, float], reach: Sequence[float], on: bool) -> str:
    x, y = mark
    said = f"{point.name}: {point.bits:.3f} bits, {point.loss:.6g}" + (f" ± {point.half:.2g}" if point.half else "")
    whisker = (
        f'<line class=whisker x1="{x:.1f}" x2="{x:.1f}" y1="{reach[0]:.1f}" y2="{reach[1]:.1f}"/>' if point.half else ""
    )
    kind = "best" if on else "other"
    return f'{whisker}<circle class={kind} cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{html.escape(said)}</title></circle>'


def _label(text: str, mark: tuple[float, float], label: Label | None, on: bool) -> str:
    if label is None:
        return ""
    box, line = label.box, ""
    if label.far:
        to = min(max(mark[0], box.x), box.x + box.width), min(max(mark[1], box.y), box.y + box.height)
        line = f'<line class=leader x1="{mark[0]:.1f}" y1="{mark[1]:.1f}" x2="{to[0]:.1f}" y2="{to[1]:.1f}"/>'
    kind = "name best" if on else "name"
    across = f'x="{box.x:.1f}" y="{box.y + 11:.1f}" data-box="{box.x:.1f} {box.y:.1f} {box.width:.1f} {box.height:.1f}"'
    fit = f' textLength="{box.width:.0f}" lengthAdjust="spacingAndGlyphs"' if text else ""  # whatever the font's widths
    return f'{line}<text class="{kind}" {across}{fit}>{html.escape(text)}</text>'


def _tick_x(x: float, text: str) -> str:
    foot = FRAME.y + FRAME.height
    line = f'<line class=grid x1="{x:.1f}" x2="{x:.1f}" y1="{FRAME.y}" y2="{foot}"/>'
    return f'{line}<text class=tick x="{x:.1f}" y="{foot + 16}">{text}</text>'


def _tick_y(y: float, text: str) -> str:
    side = f'<line class=grid x1="{FRAME.x}" x2="{FRAME.x + FRAME.width}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{side}<text class="tick side" x="{FRAME.x - 6}" y="{y + 4:.1f}">{text}</text>'


def _caption(left: Sequence[Point], labels: Sequence[Label | None]) -> str:
    notes = ["On the line: no other has as few bits and as little loss."]
    if left:
        said = ", ".join(f"{p.name} ({p.bits:g} bits, {p.loss:.6g})" for p in left)
        notes.append(f"Not on the axes: {said}.")
    if hidden := sum(label is None for label in labels):
        notes.append(f"{hidden} without room for a name; point at them.")
    return html.escape(" ".join(notes))
