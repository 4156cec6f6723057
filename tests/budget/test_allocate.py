"""The knapsack: the best of all choices, by counting them."""

import itertools

import numpy as np
import pytest

from qjax.budget import allocate
from qjax.errors import UserError


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_choices(seed):
    rng = np.random.default_rng(seed)
    sizes = [np.sort(rng.integers(1, 60, size=rng.integers(1, 5))).astype(float) for _ in range(6)]
    costs = [np.sort(rng.uniform(size=len(b)))[::-1] ** 3 for b in sizes]
    budget = sum(b.min() for b in sizes) + rng.uniform() * sum(np.ptp(b) for b in sizes)
    picks = allocate(costs, sizes, budget)
    least = min(
        sum(c[k] for c, k in zip(costs, ks, strict=True))
        for ks in itertools.product(*(range(len(b)) for b in sizes))
        if sum(b[k] for b, k in zip(sizes, ks, strict=True)) <= budget
    )
    assert sum(b[k] for b, k in zip(sizes, picks, strict=True)) <= budget
    assert sum(c[k] for c, k in zip(costs, picks, strict=True)) == pytest.approx(least, rel=1e-5)


def test_hundreds_of_groups_whose_costs_span_decades_take_a_moment():
    rng = np.random.default_rng(0)
    size = rng.integers(10_000, 5_000_000, size=300)
    bits = np.array([2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5])
    sizes = [bits * n / 8 for n in size]
    costs = [10 ** rng.uniform(-6, -1) * 4.0 ** -(bits - 2.6) for _ in size]
    budget = 4.0 * size.sum() / 8
    picks = allocate(costs, sizes, budget)
    total = sum(b[k] for b, k in zip(sizes, picks, strict=True))
    assert 0.9999 * budget < total <= budget
    # No multiplier does better: the dual is a bound from below.
    duals = [sum((c + m * b).min() for c, b in zip(costs, sizes, strict=True)) - m * budget
             for m in np.geomspace(1e-14, 1e-4, 400)]  # fmt: skip
    assert sum(c[k] for c, k in zip(costs, picks, strict=True)) <= 1.001 * max(duals)


def test_a_budget_below_the_smallest_formats_is_refused():
    with pytest.raises(UserError, match="more than the budget"):
        allocate([np.array([1.0, 0.5])] * 2, [np.array([10.0, 20.0])] * 2, 19)
