"""Chances of paired gains are those of all signs."""

import itertools

import numpy as np
import pytest

from qjax.evaluate.intervals import chance_of_gain


@pytest.mark.parametrize("count", [1, 5, 8])
def test_the_chance_of_a_gain_is_that_of_all_signs(count):
    d = np.random.default_rng(count).normal(-0.5, 1, count)
    sums = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product([1, -1], repeat=count)]
    assert chance_of_gain(d) == pytest.approx(np.mean([s <= sum(d) + 1e-9 for s in sums]))


def test_drawn_signs_are_as_rare_as_all_of_them():
    d = np.random.default_rng(0).normal(-0.1, 1, 16)
    exact = chance_of_gain(d)
    assert 0.02 < exact < 0.98 and chance_of_gain([*d, 0.0]) == pytest.approx(exact, abs=0.01)
    assert chance_of_gain([-1.0] * 40) == pytest.approx(2**-16) and chance_of_gain([1.0] * 40) == 1
