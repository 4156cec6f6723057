"""Where the labels of points go, so that none lies on another or on a point."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

LINE = 15.0  # of a font of 12 px
NARROW, BROAD = "ijltfrI.,:;'|!()[]-/ ", "mwMW%@…"
GAP = 8.0


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle: its left upper corner and its size."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        """Whether the two share any area."""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def within(self, frame: Box) -> bool:
        """Whether it lies in the frame."""
        return (
            self.x >= frame.x
            and self.y >= frame.y
            and self.x + self.width <= frame.x + frame.width
            and self.y + self.height <= frame.y + frame.height
        )


@dataclasses.dataclass(frozen=True)
class Label:
    """A label at its place; `far` from its point it needs a line there."""

    box: Box
    far: bool


def width_of(text: str) -> float:
    """Pixels that a text takes, about, in any font without serifs of 12 px."""
    return sum((4.2 if c in NARROW else 10.4 if c in BROAD else 7.0 for c in text), 0.0)


def shortened(text: str, room: float) -> str:
    """A text that is cut where it takes more than so many pixels."""
    if width_of(text) <= room:
        return text
    kept = next((n for n in range(len(text), 0, -1) if width_of(text[:n] + "…") <= room), 0)
    return text[:kept] + "…"


def place(marks: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box) -> list[Label | None]:
    """Places for labels, those that come first choosing first; None where the frame is full.

    Args:
      marks: the points, in pixels.
      texts: what stands at each.
      frame: where labels may lie.
    """
    taken = [Box(x - 4, y - 4, 8.0, 8.0) for x, y in marks]
    made: list[Label | None] = []
    for (x, y), text in zip(marks, texts, strict=True):
        label = next((at for at in _tries(x, y, width_of(text), frame) if not any(map(at.box.meets, taken))), None)
        made.append(label)
        if label is not None:
            box = label.box  # names side by side need a gap, or they read as one
            taken.append(Box(box.x - GAP / 2, box.y, box.width + GAP, box.height))
    return made


def _tries(x: float, y: float, width: float, frame: Box) -> Iterator[Label]:
    """Right, left, above and below the point; then ever farther lines, nearest first."""
    middle = y - LINE / 2
    near = [(x + GAP, middle), (x - GAP - width, middle)]
    near += [(x - width / 2, y - LINE - GAP + 2), (x - width / 2, y + GAP - 2)]
    near += [(x + GAP - 2, middle - 9), (x + GAP - 2, middle + 9), (x - GAP + 2 - width, middle - 9)]
    boxes = (Box(left, top, width, LINE) for left, top in near)
    yield from (Label(box, False) for box in boxes if box.within(frame))
    lines = [frame.y + n * LINE for n in range(int(frame.height / LINE))]
    lefts = [frame.x + n * 12.0 for n in range(int(max(frame.width - width, 0) / 12) + 1)]
    far = (Box(left, top, width, LINE) for top in lines for left in lefts)
    inside = (box for box in far if box.within(frame))
    yield from (Label(box, True) for box in sorted(inside, key=lambda box: (_reach(x, y, box), box.x, box.y)))


def _reach(x: float, y: float, box: Box) -> float:
    """How far a box is from a point; lines above and below count double, as leaders to the side read better."""
    across = max(box.x - x, 0.0, x - box.x - box.width)
    down = max(box.y - y, 0.0, y - box.y - box.height)
    return across**2 + 4 * down**2
