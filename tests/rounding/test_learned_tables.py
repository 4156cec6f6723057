"""Tables that are learned, rounded in the metric of H: what least squares and descent gain on k-means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, problem, staged

import qjax
from qjax.errors import UserError
from qjax.pipeline.rounded import round_leaf
from qjax.rounding import ldlq, nearest, refit
from qjax.rounding.protocol import DAMPING
from qjax.rounding.ranges import ends
from qjax.stats import Stats
from qjax.training.grid.quantizer import Quantizer
from qjax.training.optim.parq import piecewise_affine


def test_lnq_is_far_below_kmeans_and_each_round_is_below_the_last():
    (w, H), fmt = problem(16, 256), qjax.format("lut2")
    states = staged(w, H, fmt, nearest("h"), refit(1, 4), refit(1, 4), refit(1, 4))
    loss = [losses(w, fmt.decode(s.scales, s.codes), damped64(H, DAMPING)) for s in states]
    for a, b in itertools.pairwise(loss):
        assert (b <= a * (1 + 1e-5)).all()
    assert loss[-1].sum() < 0.6 * loss[0].sum() and loss[-1].sum() < 0.99 * loss[1].sum()
    assert qjax.recipes.lnq(2).roundings == (nearest("h"), refit(3, 4)) and qjax.recipes.lnq(2).format == fmt


def test_tables_are_below_even_levels_of_more_bits():
    """2 + 64 / 512 bits in tables against 2 + 18 / 64 of integers, heavy-tailed weights, the same chain."""
    w, H = problem(16, 512)
    w = jnp.asarray(np.random.default_rng(0).standard_t(5, w.shape), jnp.float32)
    table, even = (qjax.format(name) for name in ("lut2", "uint2_g64"))
    loss = {}
    for fmt in (table, even):
        last = staged(w, H, fmt, nearest("h"), ldlq(), refit(2, 2))[-1]
        loss[fmt] = losses(w, fmt.decode(last.scales, last.codes), damped64(H, DAMPING)).sum()
    assert qjax.quantize(w, table).bits_per_weight < qjax.quantize(w, even).bits_per_weight
    assert loss[table] < 0.9 * loss[even]


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_squeezellm_and_its_outliers(share):
    w, H = problem(16, 256)
    w = w.at[3, 5].set(30.0)
    recipe = qjax.recipes.squeezellm(2, share)
    q, _ = round_leaf("w", w, -1, recipe.format, recipe, Stats(H=H))
    extra = 32 * share * w.size + (32 * 17 if share else 0)  # values and columns, and where rows start
    assert q.bits_per_weight == pytest.approx(2 + 64 / 256 + extra / w.size, abs=0.02)
    off = abs(float(qjax.dequantize(q)[3, 5]) - 30.0)
    assert off < 0.02 if share else off < 5.0


def test_training_goes_straight_through_and_what_wants_unit_levels_says_so():
    w, fmt = problem(8, 64)[0], qjax.format("lut2")
    np.testing.assert_array_equal(qjax.fake_quant(w, fmt), qjax.dequantize(qjax.quantize(w, fmt)))
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(qjax.fake_quant(w, fmt)))(w), jnp.ones_like(w))
    with pytest.raises(UserError, match="lut2 has a table of levels and no scale to learn"):
        Quantizer(fmt, scales="learned").init(w)
    with pytest.raises(UserError, match="lut2 fits a table of levels to each row"):
        piecewise_affine(fmt)
    with pytest.raises(UserError, match="lut2 has levels of its own in each row"):
        ends(fmt)
