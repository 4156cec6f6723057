"""How much each token counts, how many that leaves, and the tokens that are alike in every window."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_walks import plan_of, put, tiny_calibration, tiny_model

from qjax.pipeline.calibrated import quantize_model, survey_model
from qjax.pipeline.massive import massive_at, summed
from qjax.pipeline.token_weights import effective, tempered


def test_tempered_weights_are_powers_and_alike_tokens_count_as_the_mean():
    s = np.random.default_rng(0).exponential(size=(4, 6)).astype(np.float32)
    assert tempered(s, 1.0, 3) is s
    alike = np.zeros((4, 6), bool)
    alike[1, 2] = True
    made = tempered(s, 0.5, 3, alike)
    assert made[:3].mean() == pytest.approx(1, rel=1e-5)
    ratio = made[0, 3] / made[2, 4]
    assert ratio == pytest.approx(np.sqrt(s[0, 3] / s[2, 4]), rel=1e-5)
    same = alike.copy()
    same[:, 0] = True
    np.testing.assert_allclose(made[same], made[:3][~same[:3]].mean(), rtol=1e-5)
    assert np.isfinite(tempered(s, 0.5, 3, np.ones((4, 6), bool))).all()  # where all are alike nothing is left to mean


def test_effective_tokens_and_windows():
    assert effective(np.full((3, 5), 7.0)) == pytest.approx((15, 3))
    one = np.zeros((3, 5))
    one[1, 2] = 4.0
    assert effective(one) == pytest.approx((1, 1))
    one[1] = 4.0  # five tokens, of one window
    assert effective(one) == pytest.approx((5, 1))


def test_massive_tokens_and_channels():
    x = np.random.default_rng(1).normal(size=(4, 6, 32)).astype(np.float32)
    assert not massive_at(x).tokens.any() and summed([massive_at(x)]) == ()
    there = x.copy()
    there[:, 0, 5] = 5e3
    there[2, 3, 5], there[2, 3, 9] = 9e3, -2e3
    found = massive_at(there)
    assert np.argwhere(found.tokens).tolist() == [[0, 0], [1, 0], [2, 0], [2, 3], [3, 0]]
    first, second = summed([massive_at(x), found, found, massive_at(x)])
    assert (first.channel, first.first, first.last, first.positions) == (5, 1, 2, (0, 3))
    assert first.times == pytest.approx(9e3 / np.median(np.abs(there)), rel=1e-3)
    assert first.share == pytest.approx(5 / 24) and second.channel == 9 and second.positions == (3,)
    assert "channel 5 in front of blocks 1 to 2" in str(first)
    assert not massive_at(np.zeros((1, 2, 3), np.float32)).tokens.any()


def test_a_walk_tells_them_and_weighs_them_as_the_mean():
    """A model whose first block writes 5000 medians into a channel at every BOS."""
    model, c = tiny_model(), tiny_calibration()
    table = np.asarray(model.params["embed"]["embedding"]).copy()
    c.tokens[:, 0] = 0
    c.tokens[:, 1:] = np.maximum(c.tokens[:, 1:], 1)
    table[0, 3] = 4e4 * np.median(np.abs(table))
    model = dataclasses.replace(model, params=put(model.params, "embed/embedding", jnp.asarray(table)))
    seen = survey_model(model, c)
    assert seen.alike[0][:, 0].all() and not seen.alike[0][:, 1:].any()
    recipe = "nearest('h') >> ldlq('act') >> options(sensitive=0.5)"
    _, report = quantize_model(model, plan_of(("*", "Q4_0")), recipe, c, seen=seen)
    assert any("channel 3 in front of blocks 0" in note for note in report.notes)
    lines = [t.calibration for t in report.tensors if t.calibration and "embed" not in t.name]
    most = c.used * c.tokens.shape[1]
    assert all(1 < line.effective_tokens < most and 1 < line.effective_windows <= c.used for line in lines)
    _, report = quantize_model(model, plan_of(("*", "Q4_0")), "gptq", c)
    assert all(t.calibration.effective_tokens is None for t in report.tensors if t.calibration)
