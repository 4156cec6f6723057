"""Training logs as a small table: a few numbers over steps, for every arm, thinned to what a figure shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

KEYS = ("loss", "heldout", "scale_drift")
MOST = 200  # rows of an arm


def curve(logs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], most: int = MOST) -> list[dict[str, Any]]:
    """{"arm", "step", and of KEYS what was logged}: means over an arm's runs, at steps that all of them logged.

    Args:
      logs: arm -> the log of each of its runs: rows with a step.
      most: rows of an arm; more are thinned evenly, the first and the last stay.
    """
    rows = []
    for arm, runs in logs.items():
        by_step = [{row["step"]: row for row in run} for run in runs]
        steps = [step for step in by_step[0] if all(step in run for run in by_step)] if by_step else []
        for step in thinned(steps, most):
            at = [run[step] for run in by_step]
            there = [key for key in KEYS if all(isinstance(row.get(key), int | float) for row in at)]
            rows.append({"arm": arm, "step": step, **{k: statistics.fmean(row[k] for row in at) for k in there}})
    return rows


def thinned(rows: Sequence[Any], most: int = MOST) -> list[Any]:
    """At most so many of a sequence, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(n * (len(rows) - 1) / (most - 1))] for n in range(most)]
