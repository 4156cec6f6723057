"""How far held-out tokens believe H and the cross term: closed forms against float64, and what they gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import means, sums
from qjax.pipeline.rounded import round_leaf
from qjax.reparam import Site, behind, reparametrize
from qjax.rounding.protocol import DAMPING
from qjax.rounding.shrinkage import SHARES, Split, cross_share, leftover, output_error, pooled, shares, shrunk

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


def nearest_h(w, fmt, stats):
    return fmt.decode(*fmt.encode(w, jnp.broadcast_to(jnp.diagonal(stats.H), w.shape)))


def test_closed_forms_are_those_of_float64(w, few):
    used, held, _ = few
    fmt = qjax.format("int3_g32")
    fit = nearest_h(w, fmt, used)
    a, t = shares(w, fit, fmt, Split(used, held, DAMPING))
    H, Hh, C, Ch = (np.asarray(v, np.float64) for v in (used.H, held.H, used.cross, held.cross))
    w64 = np.asarray(w, np.float64)
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


def test_shrunk_keeps_the_diagonal_and_takes_a_share_of_the_cross_term(few):
    stats = shrunk(few[0], 0.3, 0.6)
    H, C = np.asarray(few[0].H), np.asarray(few[0].cross)
    np.testing.assert_allclose(stats.H, np.where(np.eye(N) > 0, H, 0.7 * H), rtol=1e-6)
    np.testing.assert_allclose(stats.cross, 0.6 * C, rtol=1e-6)


def test_pooled_are_the_means_over_all_tokens():
    (x, x_float), (y, y_float) = (tokens(np.random.default_rng(s), n) for s, n in ((5, 40), (6, 8)))
    both = seen(jnp.concatenate([x, y]), jnp.concatenate([x_float, y_float]))
    made = pooled(seen(x, x_float), seen(y, y_float))
    for kind in ("H", "cross", "count"):
        np.testing.assert_allclose(getattr(made, kind), getattr(both, kind), rtol=1e-4, atol=1e-4)


def test_many_tokens_are_believed_and_few_are_not(w):
    rng = np.random.default_rng(7)
    fmt = qjax.format("int3_g32")
    found = [
        shares(
            w,
            nearest_h(w, fmt, seen(*tokens(rng, 9))),
            fmt,
            Split(seen(*tokens(rng, n)), seen(*tokens(rng, n)), DAMPING),
        )
        for n in (20, 20_000)
    ]
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
    monkeypatch.setattr("qjax.pipeline.believed.shares", lambda *args: (0.0, jnp.float32(1)))
    made = qjax.recipe("nearest('h') >> ldlq('act', cross=1.0) >> options(shrink=True)")
    q, line = round_leaf("w", w, -1, qjax.format("int3_g32"), made, used, held)
    fit, _ = round_leaf("w", w, -1, qjax.format("int3_g32"), qjax.recipe("imatrix"), pooled(used, held))
    assert line.guarded
    np.testing.assert_array_equal(qjax.dequantize(q), qjax.dequantize(fit))


CHAINS = ("hadamard() >> rescale()", "permute() >> awq_scale()", "columns(share=0.1)", "low_rank(4)", "act('int8')")


@pytest.mark.parametrize("chain", CHAINS)
def test_behind_a_change_of_variables_h_is_that_of_what_the_codes_meet(w, few, chain):
    """Held-out tokens follow the chain that all tokens chose; feedback there loses less than the fit there."""
    x, x_float = tokens(np.random.default_rng(3), 24)
    used, held = (
        means(sums(v, ("H", "cross", "absmean", "absmax"), f))
        for v, f in ((x[:20], x_float[:20]), (x[20:], x_float[20:]))
    )
    fmt = qjax.format("int3_g32")
    _, applied, _ = reparametrize(qjax.recipe(f"{chain} >> nearest()").reparams, Site(w, pooled(used, held), fmt))
    there = held.only(("H", "cross"))
    for one in (one for one in applied if not one.rounds_input):
        x, x_float = one.input(x), one.input(x_float)
    exact = means(sums(x[20:], ("H", "cross"), x_float[20:]))
    got = behind(applied, there)
    for kind in ("H", "cross"):
        scale = np.abs(np.asarray(getattr(exact, kind))).max()
        np.testing.assert_allclose(getattr(got, kind), getattr(exact, kind), atol=1e-5 * scale)
    loss = {}
    for stages in ("nearest('h')", "nearest('h') >> ldlq('act', cross=1.0) >> refit(1, 1) >> options(shrink=True)"):
        q, line = round_leaf("w", w, -1, fmt, qjax.recipe(f"{chain} >> {stages}"), used, held)
        loss[stages] = float(output_error(w, qjax.dequantize(q), few[2]))
    assert line.shrinkage is not None and line.shrinkage > 0
    assert min(loss, key=loss.get) != "nearest('h')"


def test_where_the_fit_is_better_outliers_are_none(w, monkeypatch):
    """A stack of which one matrix is guarded still is one array."""
    used, held = seen(*tokens(np.random.default_rng(4), 16)), seen(*tokens(np.random.default_rng(5), 64))
    monkeypatch.setattr("qjax.pipeline.believed.output_error", lambda w, w_hat, seen: jnp.sum(w * 0) + next(errors))
    errors = iter([0.0, 1.0, 1.0, 0.0])  # the fit's, ours; twice
    made = qjax.recipe("spqr(threshold=0.2) >> options(shrink=True)")
    q, line = round_leaf("w", jnp.stack([w, w]), -1, qjax.format("int3_g32"), made, used, held)
    assert line.guarded and q.shape == (2, ROWS, N)
    fit, _ = round_leaf("w", w, -1, qjax.format("int3_g32"), qjax.recipe("imatrix"), pooled(used, held))
    np.testing.assert_array_equal(qjax.dequantize(q)[0], qjax.dequantize(fit))


def test_without_held_out_tokens_nothing_is_shrunk_and_the_report_says_so(w, few):
    _, line = round_leaf("w", w, -1, qjax.format("int3_g32"), qjax.recipe("gptq >> options(shrink=True)"), few[2])
    assert line.shrinkage is None and line.note == "no window was held out, so nothing was shrunk"


def test_what_shrink_does_not_go_with_is_said():
    with pytest.raises(qjax.errors.UserError, match="from 0 to 1"):
        qjax.recipe("gptq >> options(sensitive=2.0)")
    assert str(qjax.recipe("gptq >> options(sensitive=0.5, shrink=True)")).endswith(
        "options(sensitive=0.5, shrink=True)"
    )


def test_no_second_compilation(w, few):
    used, held, _ = few
    fmt = qjax.format("int3_g32")
    fit, split = nearest_h(w, fmt, used), Split(used, held, DAMPING)
    shares(w, fit, fmt, split)
    programs = (leftover, cross_share, output_error)
    output_error(w, fit, held)
    count = [f._cache_size() for f in programs]
    shares(w + 1, fit, fmt, Split(held, used, 2 * DAMPING))
    output_error(w + 1, fit, used)
    assert [f._cache_size() for f in programs] == count


def test_weights_of_one_input_share_what_is_made_of_it(w, few, monkeypatch):
    used, held, _ = few
    calls = []
    monkeypatch.setattr("qjax.rounding.shrinkage.leftover", lambda *args: calls.append(args[2]) or leftover(*args))
    fmt, made, shared = qjax.format("int3_g32"), qjax.recipe("gptq >> options(shrink=True)"), {}
    alone = [round_leaf("w", v, -1, fmt, made, used, held) for v in (w, w[::-1])]
    once = len(calls)
    together = [round_leaf("w", v, -1, fmt, made, used, held, shared) for v in (w, w[::-1])]
    assert len(calls) - once < once
    for (a, _), (b, _) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(qjax.dequantize(a), qjax.dequantize(b))
    assert jax.tree.structure(held) == jax.tree.structure(used)
