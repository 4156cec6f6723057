"""Intervals of means over a few runs.

mean +- t_{n-1} sd / sqrt(n)        t: the 97.5 % point of Student's distribution
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of values, paired differences for example; None for fewer than two.

    >>> round(half_interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
