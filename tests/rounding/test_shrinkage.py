"""How far held-out tokens believe H and the cross term: closed forms against float64, and what they gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import means, sums
from qjax.pipeline.rounded import round_leaf
from qjax.rounding.protocol import DAMPING
from qjax.rounding.shrinkage import SHARES, output_error, pooled, shrunk, toward_diagonal

N, ROWS = 64, 48


def tokens(rng, count, drift=0.3):
    """Inputs with a few strong directions, and the float model's, of which they are a noisy linear image."""
    mix = np.random.default_rng(1).normal(size=(N, N)) * np.geomspace(3, 0.1, N)
    x = rng.normal(size=(count, N)) @ mix.T
    there = x + drift * x @ np.random.default_rng(2).normal(size=(N, N)) / N + rng.normal(size=x.shape)
    return jnp.asarray(x, jnp.float32), jnp.asarray(there, jnp.float32)


def seen(*of):
    return means(sums(of[0], ("H", "cross"), of[1]))


@pytest.fixture(scope="module")
def w():
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, N)), jnp.float32)


@pytest.fixture(scope="module")
def few():
    """(24 tokens, 8 held out, 4096 of the test)."""
    rng = np.random.default_rng(3)
    return tuple(seen(*tokens(rng, n)) for n in (24, 8, 4096))


def test_closed_forms_are_those_of_float64(w, few):
    used, held, _ = few
    fmt = qjax.format("int3_g32")
    stats, a, t = shrunk(w, fmt, used, held, DAMPING)
    H, Hh, C, Ch = (np.asarray(v, np.float64) for v in (used.H, held.H, used.cross, held.cross))
    w64 = np.asarray(w, np.float64)
    fit = fmt.decode(*fmt.encode(w, jnp.broadcast_to(jnp.diagonal(used.H), w.shape)))
    s2 = np.mean((w64 - np.asarray(fit)) ** 2, axis=0)

    def damped(a):
        made = (1 - a) * H + a * np.diag(np.diag(H))
        return made + DAMPING * np.diag(np.diag(made))

    costs = []
    for a_ in SHARES:
        order = np.argsort(np.diag(H))  # the column rounded first comes last
        c = np.linalg.cholesky(damped(a_)[np.ix_(order, order)])
        inverse = np.linalg.inv(c / np.diag(c))
        costs.append(np.sum(s2[order] * np.diag(inverse @ Hh[np.ix_(order, order)] @ inverse.T)))
    assert float(a) == pytest.approx(SHARES[int(np.argmin(costs))])
    assert 0 < float(a) < 1, "the case must have something to choose"
    delta = w64 @ C @ np.linalg.inv(damped(float(a)))
    share = np.sum((w64 @ Ch) * delta) / np.trace(delta @ Hh @ delta.T)
    assert float(t) == pytest.approx(np.clip(share, 0, 1), rel=1e-3)
    whole = pooled(used, held)
    np.testing.assert_allclose(stats.H, toward_diagonal(whole.H, a), rtol=1e-6)
    np.testing.assert_allclose(stats.cross, t * whole.cross, rtol=1e-6)


def test_pooled_are_the_means_over_all_tokens():
    (x, x_float), (y, y_float) = (tokens(np.random.default_rng(s), n) for s, n in ((5, 40), (6, 8)))
    both = seen(jnp.concatenate([x, y]), jnp.concatenate([x_float, y_float]))
    made = pooled(seen(x, x_float), seen(y, y_float))
    for kind in ("H", "cross", "count"):
        np.testing.assert_allclose(getattr(made, kind), getattr(both, kind), rtol=1e-4, atol=1e-4)


def test_many_tokens_are_believed_and_few_are_not(w):
    rng = np.random.default_rng(7)
    fmt = qjax.format("int3_g32")
    found = [shrunk(w, fmt, seen(*tokens(rng, n)), seen(*tokens(rng, n)), DAMPING)[1:] for n in (20, 20_000)]
    (few_a, few_t), (many_a, many_t) = (map(float, f) for f in found)
    assert few_a > many_a and many_a <= 0.05
    assert few_t < many_t and many_t > 0.9


def test_feedback_from_few_tokens_loses_less_when_it_is_shrunk(w, few):
    """On the tokens of the test, against the float model's output."""
    used, held, test = few
    loss = {}
    for name in ("gptaq", "gptaq >> options(shrink=True)", "imatrix"):
        made = qjax.recipe(name)
        stats = used if made.shrink else pooled(used, held)
        q, line = round_leaf("w", w, -1, qjax.format("int3_g32"), made, stats, held if made.shrink else None)
        loss[name] = float(output_error(w, qjax.dequantize(q), test))
        assert (line.shrinkage is not None) == made.shrink and line.tokens == 32
    base = float(output_error(w, w, test))  # 0: nothing rounded and nothing corrected
    assert base == 0
    assert loss["gptaq >> options(shrink=True)"] < 0.8 * loss["gptaq"]
    assert loss["gptaq >> options(shrink=True)"] < loss["imatrix"]


def test_the_fit_is_written_where_held_out_tokens_like_it_better(w, monkeypatch):
    """Believed whole, statistics that say nothing of the other tokens lose to the fit."""
    rng = np.random.default_rng(9)
    x, x_float = tokens(rng, 16)
    other = jnp.asarray(rng.normal(size=(512, N)) * np.geomspace(0.1, 3, N), jnp.float32)
    held, used = means(sums(other, ("H", "cross"), other)), seen(x, x_float)
    believed = (used, jnp.float32(0), jnp.float32(1))
    monkeypatch.setattr("qjax.pipeline.rounded.shrunk", lambda *args: believed)
    made = qjax.recipe("nearest('h') >> ldlq('act', cross=1.0) >> options(shrink=True)")
    q, line = round_leaf("w", w, -1, qjax.format("int3_g32"), made, used, held)
    fit, _ = round_leaf("w", w, -1, qjax.format("int3_g32"), qjax.recipe("imatrix"), used)
    assert line.guarded
    np.testing.assert_array_equal(qjax.dequantize(q), qjax.dequantize(fit))


def test_without_held_out_tokens_nothing_is_shrunk_and_the_report_says_so(w, few):
    _, line = round_leaf("w", w, -1, qjax.format("int3_g32"), qjax.recipe("gptq >> options(shrink=True)"), few[2])
    assert line.shrinkage is None and line.note == "no window was held out, so nothing was shrunk"


def test_what_shrink_does_not_go_with_is_said():
    with pytest.raises(qjax.errors.UserError, match="no change of variables"):
        qjax.recipe("hadamard() >> nearest() >> ldlq() >> options(shrink=True)")
    with pytest.raises(qjax.errors.UserError, match="from 0 to 1"):
        qjax.recipe("gptq >> options(sensitive=2.0)")
    assert str(qjax.recipe("gptq >> options(sensitive=0.5, shrink=True)")).endswith(
        "options(sensitive=0.5, shrink=True)"
    )


def test_no_second_compilation(w, few):
    used, held, _ = few
    fmt = qjax.format("int3_g32")
    shrunk(w, fmt, used, held, DAMPING)
    count = shrunk._cache_size()
    shrunk(w + 1, fmt, held, used, DAMPING)
    assert shrunk._cache_size() == count
    assert jax.tree.structure(held) == jax.tree.structure(used)
