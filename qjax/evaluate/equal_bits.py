"""Families of formats at equal bits: the KL of each where it stores none, and which lies below which.

    log KL(b) = (1 - s) log KL_1 + s log KL_2        s = (b - b_1) / (b_2 - b_1),   b_1 <= b <= b_2

between the two neighbours on the family's front, those of its members that no other member beats in bits and in KL
(means over texts). Nothing is said beyond the ends of a front. Each text has a curve of its own on these members, so
that two families are compared text by text: the ratio of their KL is exp of the mean difference d of the logarithms,
and half its 95 % interval, to first order, is that of d times the ratio.

Rates are those of stored bits. What an entropy coder would take (rounding/watersic.py) has no place here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.evaluate.intervals import half_interval


@dataclasses.dataclass(frozen=True)
class Member:
    """A method of a family: stored bits of a weight, and the KL of each text."""

    name: str
    family: str
    bits: float
    kl: tuple[float, ...]


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of (bits, loss) no other beats: none with as few bits and as little loss that has less of one."""
    best, kept = math.inf, set()
    for bits, loss in sorted(set(points)):
        if loss < best:
            best = loss
            kept.add((bits, loss))
    return [point in kept for point in points]


def at_bits(members: Sequence[Member], bits: float) -> tuple[np.ndarray, str] | None:
    """Logarithms of the KL of one family, by text, and between which members; None beyond its ends.

    >>> a, b = Member("a", "f", 2.0, (0.4,)), Member("b", "f", 3.0, (0.1,))
    >>> logs, between = at_bits((a, b), 2.5)
    >>> round(float(np.exp(logs[0])), 3), between
    (0.2, 'a, b')
    """
    on = on_front([(m.bits, float(np.mean(m.kl))) for m in members])
    line = sorted((m for m, best in zip(members, on, strict=True) if best), key=lambda m: m.bits)
    for low, high in zip(line, line[1:] or line, strict=False):
        if low.bits <= bits <= high.bits:
            s = (bits - low.bits) / (high.bits - low.bits) if high.bits > low.bits else 0.0
            names = [m.name for m, share in ((low, 1.0 - s), (high, s)) if share > 0]
            return (1.0 - s) * np.log(low.kl) + s * np.log(high.kl), ", ".join(names)
    return None


def at_equal_bits(members: Sequence[Member], rates: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each rate and family that has one: the KL, the geometric mean over texts, and where it is from."""
    rows = []
    for bits in rates:
        for family in dict.fromkeys(m.family for m in members):
            found = at_bits([m for m in members if m.family == family], bits)
            if found is None:
                continue
            kl = math.exp(found[0].mean())
            half = half_interval(list(found[0]))
            rows.append({"bits": bits, "family": family, "kl": kl, "between": found[1]}
                        | ({} if half is None else {"kl_half_interval": kl * half}))  # fmt: skip
    return rows


def claims(members: Sequence[Member], rates: Sequence[float], order: Sequence[str]) -> list[dict[str, Any]]:
    """Whether families lie below each other in an order, the least KL first.

    Args:
      order: families; those without a place at a rate are left out there.

    Returns: a row for each rate and neighbours of the order: the ratio of the first's KL to the second's; "holds" where
      its interval lies below 1, "fails" where it lies above, "tie" where it holds 1, "one text" where there is none.
    """
    rows = []
    for bits in rates:
        found = {f: at_bits([m for m in members if m.family == f], bits) for f in order}
        there = [(f, at[0]) for f, at in found.items() if at is not None]
        for (a, log_a), (b, log_b) in itertools.pairwise(there):
            d = log_a - log_b
            ratio, half = math.exp(d.mean()), half_interval(list(d))
            verdict = "one text" if half is None else "holds" if d.mean() + half < 0 else "tie"
            verdict = "fails" if half is not None and d.mean() - half > 0 else verdict
            rows.append({"bits": bits, "claim": f"{a} < {b}", "ratio": ratio, "verdict": verdict}
                        | ({} if half is None else {"ratio_half_width": ratio * half}))  # fmt: skip
    return rows
