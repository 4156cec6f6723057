"""The choice of a format for every group of weights that costs least and fits into so many bytes.

    min  sum_g cost[g, c_g]        subject to        sum_g bytes[g, c_g] <= budget

the multiple-choice knapsack, solved exactly as an integer program (HiGHS, through scipy): its relaxation, which a
Lagrangian multiplier solves, leaves one group at most between two formats, so that a few branches settle the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from qjax.errors import UserError
from qjax.tables import size

GAP = 1e-6
"""Of the least cost, relative: where the solver may stop."""
SECONDS = 60.0
"""When it must: its best choice so far is taken, which is as good as the multiplier's and one group better."""


def allocate(costs: Sequence[np.ndarray], nbytes: Sequence[np.ndarray], budget: float | int) -> list[int]:
    """The choice c_g of every group.

    Args:
      costs: of each group, what each of its choices costs, f[choices]; finite.
      nbytes: what each takes, in bytes.
      budget: bytes that all may take together.

    Raises:
      UserError: the smallest choices are larger than the budget.

    >>> allocate([np.array([4.0, 1.0]), np.array([3.0, 2.0])], [np.array([1, 2]), np.array([1, 2])], 3)
    [1, 0]
    """
    least = sum(float(np.min(b)) for b in nbytes)
    if least > budget:
        raise too_small(least, budget)
    count = [len(c) for c in costs]
    group = np.repeat(np.arange(len(count)), count)
    cost, bytes_of = np.concatenate(costs).astype(np.float64), np.concatenate(nbytes).astype(np.float64)
    ones = csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(count), len(group)))
    unit, scale = max(float(bytes_of.max()), 1.0), max(float(cost.max()), 1e-300)
    solved = milp(
        cost / scale,
        integrality=np.ones(len(group)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(ones, 1, 1),
            LinearConstraint((bytes_of / unit)[None], -np.inf, budget / unit),
        ],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if solved.x is None:
        raise UserError(f"no choice of formats was found for {size(budget)}: {solved.message}")
    first = np.cumsum([0, *count[:-1]])
    return [int(np.argmax(solved.x[a : a + n])) for a, n in zip(first, count, strict=True)]


def too_small(least: float | int, budget: float | int) -> UserError:
    """What to raise where no choice fits."""
    return UserError(f"the smallest formats take {size(least)}, more than the budget's {size(budget)} for them")
