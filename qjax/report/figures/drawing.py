"""A figure as SVG: its elements, the whole on a page or in a file of its own; colours are the page's CSS variables."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence

from qjax.html_page import COLOURS
from qjax.report.figures.labels import Box
from qjax.report.schema import Cell

WIDE, SLIM = 900.0, 340.0  # pixels: of a page's column, and of a phone's
SERIES = 6  # colours; more lines are dashed

STYLE = """
svg { display: block; width: 100%; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } svg .tick { fill: var(--dim); } svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; } svg .axis, svg .panel { font-weight: 600; }
svg .name { fill: var(--dim); paint-order: stroke; stroke: var(--back); stroke-width: 3px; }
svg .name.best { fill: var(--text); }
svg .ground { fill: var(--back); } svg .frame { fill: none; stroke: var(--line); }
svg .grid { stroke: var(--line); stroke-width: .5; }
svg .front { fill: none; stroke: var(--best); stroke-dasharray: 4 3; }
svg .leader { stroke: var(--dim); stroke-width: .6; }
svg circle.best { fill: var(--best); } svg circle.other { fill: var(--other); } svg .whisker { stroke: var(--dim); }
svg .bar { fill: var(--other); } svg .heat { fill: var(--heat); } svg .hole { fill: var(--soft); }
svg .area { fill: var(--best); fill-opacity: .35; } svg .outline { fill: none; stroke: var(--text); }
svg .roof { fill: none; stroke: var(--text); stroke-width: 1.5; }
svg .series { fill: none; stroke-width: 1.6; } svg .dash1 { stroke-dasharray: 6 3; }
svg .dash2 { stroke-dasharray: 2 3; } svg circle.series { stroke: none; }
""" + "".join(f"svg .s{n} {{ stroke: var(--s{n}); }} svg circle.s{n} {{ fill: var(--s{n}); }}\n" for n in range(SERIES))

# A page has each figure twice; a phone shows the slim one, whose letters are not smaller on it than on a desk.
BOTH = """
figcaption { margin-bottom: .4rem; } figure.slim { display: none; max-width: 480px; } figure.wide { max-width: 900px; }
@media (max-width: 860px) { figure.slim { display: block; } figure.wide { display: none; } }
"""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure drawn.

    Attributes:
      width, height: in pixels.
      parts: SVG elements.
      title: what it shows, in a few words.
      caption: what a reader must know besides, as text.
    """

    width: float
    height: float
    parts: tuple[str, ...]
    title: str
    caption: str = ""


def on_page(drawing: Drawing) -> str:
    """An HTML figure, "wide" or "slim" by its width; the page needs `STYLE` and `BOTH`."""
    kind = "slim" if drawing.width == SLIM else "wide"
    said = f"<strong>{html.escape(drawing.title)}.</strong> {html.escape(drawing.caption)}".strip()
    return f'<figure class="{kind}"><figcaption>{said}</figcaption>{_svg(drawing)}</figure>'


def alone(drawing: Drawing) -> str:
    """An SVG file with its own colours, light and dark."""
    ground = f'<rect class="ground" width="{drawing.width:g}" height="{drawing.height:g}"/>'
    whole = dataclasses.replace(drawing, parts=(f"<style>{COLOURS}{STYLE}</style>{ground}", *drawing.parts))
    size = f' xmlns="http://www.w3.org/2000/svg" width="{drawing.width:g}" height="{drawing.height:g}"'
    return _svg(whole, size) + "\n"


def _svg(drawing: Drawing, more: str = "") -> str:
    name = html.escape(drawing.title)
    box = f'viewBox="0 0 {drawing.width:g} {drawing.height:g}"'
    return f'<svg{more} {box} role="img" aria-label="{name}">{"".join(drawing.parts)}</svg>'


def side_by_side(drawings: Sequence[Drawing], width: float, title: str, caption: str = "") -> Drawing:
    """Panels of a figure under their own titles, two in a row where there is room for them; one alone is the figure.

    Args:
      drawings: drawn for `panel_width(count, width)`.
      width: of the whole.
      title, caption: of the whole.
    """
    if len(drawings) == 1:
        said = " ".join(filter(None, (drawings[0].caption, caption)))
        whole = f"{title}: {drawings[0].title}" if drawings[0].title else title
        return dataclasses.replace(drawings[0], title=whole, caption=said)
    across = 1 if width == SLIM else 2
    tall = max(d.height for d in drawings) + 22
    parts = []
    for n, panel in enumerate(drawings):
        down, right = divmod(n, across)
        head = text("panel", 0.0, 14.0, panel.title)
        at = f"translate({right * (width / across + 10):g} {down * tall:g})"
        parts.append(f'<g transform="{at}">{head}<g transform="translate(0 22)">{"".join(panel.parts)}</g></g>')
    said = " ".join([*(f"{d.title}: {d.caption}" for d in drawings if d.caption), caption]).strip()
    return Drawing(width, tall * -(-len(drawings) // across), tuple(parts), title, said)


def panel_width(count: int, width: float) -> float:
    """The width that each of several panels has."""
    return width if width == SLIM or count == 1 else width / 2 - 10


def by_panel(rows: Iterable[Mapping[str, Cell]]) -> dict[str, list[Mapping[str, Cell]]]:
    """Rows by what they are of."""
    found: dict[str, list[Mapping[str, Cell]]] = {}
    for row in rows:
        found.setdefault(str(row.get("of") or ""), []).append(row)
    return found


def text(kind: str, x: float, y: float, said: str, fit: float = 0.0, box: Box | None = None) -> str:
    """A text at its baseline; one with `fit` takes that width whatever the font, one with a box says it lies there."""
    long = f' textLength="{fit:.0f}" lengthAdjust="spacingAndGlyphs"' if fit else ""
    where = f' data-box="{box.x:.1f} {box.y:.1f} {box.width:.1f} {box.height:.1f}"' if box else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{where}{long}>{html.escape(said)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def path(kind: str, points: Sequence[tuple[float, float]]) -> str:
    """Straight lines from point to point."""
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def rect(kind: str, box: Box, tip: str = "", strength: float = 1.0) -> str:
    """A rectangle, filled to some strength, with a tooltip."""
    share = f' fill-opacity="{strength:.2f}"' if strength < 1 else ""
    at = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    return f'<rect class="{kind}" {at}{share}>{_tip(tip)}</rect>'


def circle(kind: str, x: float, y: float, radius: float, tip: str = "") -> str:
    """A point, with a tooltip."""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">{_tip(tip)}</circle>'


def _tip(said: str) -> str:
    return f"<title>{html.escape(said)}</title>" if said else ""
