"""Intervals of means over a few runs, and how likely a paired difference is by chance.

mean +- t_{n-1} sd / sqrt(n)              t: the 97.5 % point of Student's distribution
p = share of all signs s with sum_i s_i d_i <= sum_i d_i
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy.stats import t

MOST_EXACT = 16  # differences all of whose signs are tried


def half_interval(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the mean of values, paired differences for example; None for fewer than two.

    >>> round(half_interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    n = len(values)
    return float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def ratio_of_means(a: np.ndarray, b: np.ndarray) -> tuple[float, float | None]:
    """mean(a) / mean(b) of paired values, and half its 95 % interval, to first order: that of (a - ratio b) / mean(b).

    >>> ratio_of_means(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    (0.5, 0.0)
    """
    ratio = float(a.sum() / b.sum())
    return ratio, half_interval(list((a - ratio * b) / b.mean()))


def chance_of_gain(differences: Sequence[float] | np.ndarray) -> float:
    """How likely paired differences would have so low a mean if each could as well have had the other sign.

    Fisher's permutation test, one-sided: exact for up to 16 differences; beyond, over 65,535 signs drawn from one seed
    and those that were found.

    >>> chance_of_gain([-1.0, -2.0, -3.0])
    0.125
    """
    d = np.asarray(differences, np.float64)
    if len(d) <= MOST_EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    else:
        drawn = np.random.default_rng(0).choice([-1, 1], (2**MOST_EXACT - 1, len(d)))
        signs = np.concatenate([np.ones((1, len(d)), int), drawn])
    return float(np.mean(signs @ d <= d.sum() + 1e-12 * np.abs(d).sum()))
