"""What must hold exactly: GPTQ is LDLQ, a diagonal H changes nothing, losses only fall, the theory's numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, factor, float64, losses, marked, problem, second_moment
from rounding_reference import gptq

import qjax
from qjax.rounding import descend, ldlq, nearest, refit, round_weight
from qjax.rounding.curvature import cholesky, order_of
from qjax.rounding.ldlq import corrected
from qjax.stats import Stats

ROWS, N = 8, 256
DAMPING = 0.05
CODES = {  # all codes of a format
    "int4_g128": range(-8, 8),
    "uint4_g32": range(16),
    "Q4_0": range(-8, 8),
    "Q4_K": range(16),
    "Q3_K": range(-4, 4),
    "IQ4_NL": range(16),
    "NF4": range(16),
}


@pytest.fixture(scope="module")
def w_H():
    return problem(ROWS, N)


def all_levels(fmt, scales, codes: range, shape) -> np.ndarray:
    """The value of every code of every weight, by decoding them: f64[rows, n, count]."""
    dtype = fmt.nearest(scales, jnp.zeros(shape, jnp.float32)).dtype
    return np.stack([np.float64(fmt.decode(scales, jnp.full(shape, c, dtype))) for c in codes], axis=-1)


def assert_equal_but_for_ties(ours, theirs, margin, order) -> bool:
    """A row in which something differs starts to at a weight that lies between two levels, and is a rare one.

    Returns: whether all is equal.
    """
    different = ~np.isclose(ours, theirs, rtol=1e-5, atol=1e-7)[:, order]
    rows = np.flatnonzero(different.any(axis=1))
    first = different.argmax(axis=1)
    assert (margin[rows, order[first[rows]]] < 1e-4).all()
    assert rows.size <= 1
    return not rows.size


# GPTQ


GPTQ_CASES = list(zip(CODES, itertools.cycle(["natural", "act"]), strict=False))
GPTQ_FAST = [("int4_g128", "natural"), ("Q4_K", "act"), ("NF4", "natural")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name, order", marked(GPTQ_CASES, GPTQ_FAST))
def test_gptq_is_ldlq(name, order, w_H):
    w, H = w_H
    fmt = qjax.format(name)
    r = round_weight(w, fmt, (nearest("h"), ldlq(order)), Stats(H=H), DAMPING)
    ours = np.float64(fmt.decode(r.scales, r.codes))

    levels = all_levels(fmt, r.scales, CODES[name], w.shape)
    columns = np.arange(N) if order == "natural" else np.argsort(-np.diag(H), kind="stable")
    theirs, margin = gptq(np.float64(w), damped64(H, DAMPING), columns, lambda j: levels[:, j])

    equal = assert_equal_but_for_ties(ours, theirs, margin, columns)
    whole = losses(w, 0 * w, H).sum()
    assert float(r.loss) == pytest.approx(losses(w, ours, H).sum() / whole, rel=1e-5)
    assert float(r.loss) == pytest.approx(losses(w, theirs, H).sum() / whole, rel=1e-5 if equal else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uint4_g32", "NF4"])
def test_dynamic_groups_are_gptq_fitting_each_group_on_its_way(name, w_H):
    w, H = w_H
    fmt = qjax.format(name)
    r = round_weight(w, fmt, (nearest("h"), ldlq("natural", "dynamic")), Stats(H=H), DAMPING)
    ours = np.float64(fmt.decode(r.scales, r.codes))

    h, levels, fit = jnp.diagonal(H), {}, jax.jit(fmt.fit)

    def start(i, now):
        """Fit the group that begins with column i on the weights as they are."""
        if i % fmt.block == 0:
            x = jnp.asarray(now[:, i : i + fmt.block], jnp.float32)
            scales = fit(x, jnp.broadcast_to(h[None, i : i + fmt.block], x.shape))
            found = all_levels(fmt, scales, CODES[name], x.shape)
            levels.update({i + k: found[:, k] for k in range(fmt.block)})

    theirs, margin = gptq(np.float64(w), damped64(H, DAMPING), np.arange(N), lambda j: levels[j], start)
    assert_equal_but_for_ties(ours, theirs, margin, np.arange(N))
    assert losses(w, ours, H).sum() == pytest.approx(losses(w, theirs, H).sum(), rel=1e-2)


def test_group_order_keeps_groups_whole_and_puts_the_largest_first():
    h = jnp.asarray(np.random.default_rng(0).permutation(64), jnp.float32)
    first_to_last = np.asarray(order_of(h, "group", 1, 16))[::-1]
    groups, ranked = first_to_last.reshape(4, 16) // 16, np.asarray(h)[first_to_last].reshape(4, 16)
    assert (groups == groups[:, :1]).all()
    assert (np.diff(ranked, axis=1) < 0).all() and (np.diff(ranked[:, 0]) < 0).all()


# H without correlations

DIAGONAL = {"identity": np.ones(N), "diagonal": np.random.default_rng(3).lognormal(0, 1, N)}
FLAT = {
    "natural": ldlq("natural"),
    "act": ldlq("act"),
    "group": ldlq("group"),
    "descend": descend(2),
}


FLAT_CASES = [("int4_g128", "act"), ("NF4", "natural"), ("Q3_K", "group"), ("NF4", "descend")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("h", DIAGONAL)
@pytest.mark.parametrize("name, stage", FLAT_CASES)
def test_a_diagonal_H_leaves_the_nearest_codes(name, stage, h, w_H):
    w, fmt = w_H[0], qjax.format(name)
    H = jnp.diag(jnp.asarray(DIAGONAL[h], jnp.float32))
    r = round_weight(w, fmt, (nearest(), FLAT[stage]), Stats(H=H))
    np.testing.assert_array_equal(r.codes, fmt.nearest(r.scales, w))


@pytest.mark.slow
def test_a_diagonal_H_leaves_the_dynamic_fit(w_H):
    w, fmt = w_H[0], qjax.format("uint4_g64_mse")
    H = jnp.diag(jnp.asarray(DIAGONAL["diagonal"], jnp.float32))
    r = round_weight(w, fmt, (nearest("h"), ldlq("group", "dynamic")), Stats(H=H))
    plain = round_weight(w, fmt, (nearest("h"),), Stats(H=H))
    np.testing.assert_array_equal(r.codes, plain.codes)
    np.testing.assert_array_equal(r.scales["scale"], plain.scales["scale"])


# losses fall


FALL = [("Q3_K", descend(3)), ("uint4_g32", refit(3, 2)), ("NF4_dq", refit(1)), ("NF4_dq", descend(1))]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name, stage", FALL, ids=str)
def test_descend_and_refit_never_raise_the_loss(name, stage, w_H):
    """Row by row, from a start as bad as plain nearest; all formats: test_rounding_contract."""
    w, H = w_H
    fmt = qjax.format(name)
    start = round_weight(w, fmt, (nearest(),), Stats(H=H))
    after = round_weight(w, fmt, (nearest(), stage), Stats(H=H))
    before, now = (losses(w, fmt.decode(r.scales, r.codes), damped64(H, DAMPING)) for r in (start, after))
    if fmt.rows != 1:
        before, now = before.sum(keepdims=True), now.sum(keepdims=True)
    assert (now <= before * (1 + 1e-5)).all()
    assert now.sum() < 0.8 * before.sum()


@pytest.mark.slow
def test_refit_moves_scales_under_one_of_the_row():
    """Units of columns do not cut the row's super-scale: it stays, and the groups' own scales move under it."""
    w, H = problem(4, 512)
    fmt, stats = qjax.format("int3_g16_mse_u4xrow"), Stats(H=H)
    before, after = (round_weight(w, fmt, chain, stats) for chain in ((nearest(),), (nearest(), refit(1))))
    np.testing.assert_array_equal(after.scales["super"], before.scales["super"])
    assert float(after.loss) < 0.7 * float(before.loss)
    fixed = losses(w, fmt.decode(before.scales, after.codes), H).sum()
    assert losses(w, fmt.decode(after.scales, after.codes), H).sum() < fixed


def test_more_sweeps_do_not_raise_the_loss(w_H):
    w, H = w_H
    loss = [float(round_weight(w, qjax.format("Q3_K"), (nearest(), descend(k)), Stats(H=H)).loss) for k in (1, 3)]
    assert loss[0] > loss[1]


# the theory's numbers


@pytest.mark.parametrize("order", ["natural", "act"])
def test_expected_losses_of_a_fine_grid(order):
    """Nearest loses s^2 / 12 tr(H) a row, LDLQ s^2 / 12 tr(D): QuIP, lemma 3 and theorem 1."""
    w, H = problem(64, N)
    fmt = qjax.format("int8_row")
    H64 = damped64(H, DAMPING)
    columns = np.arange(N) if order == "natural" else np.argsort(-np.diag(H), kind="stable")
    last_first = columns[::-1]
    D = np.diag(np.linalg.cholesky(H64[np.ix_(last_first, last_first)])) ** 2
    for chain, trace in (((nearest(),), np.trace(H64)), ((nearest(), ldlq(order)), D.sum())):
        r = round_weight(w, fmt, chain, Stats(H=H), DAMPING)
        expected = (np.float64(r.scales["scale"]) ** 2).sum() / 12 * trace
        assert losses(w, fmt.decode(r.scales, r.codes), H64).sum() == pytest.approx(expected, rel=0.1)
    assert D.sum() < 0.8 * np.trace(H64)


def test_the_factor_is_that_of_float64(w_H):
    H = w_H[1]
    L = np.linalg.cholesky(damped64(H, DAMPING))
    feedback, damping = factor(H, DAMPING)
    assert float(damping) == pytest.approx(DAMPING)
    np.testing.assert_allclose(feedback, L / np.diag(L) - np.eye(N), atol=1e-4)


# the cross term


@pytest.fixture(scope="module")
def inputs():
    """Inputs of the float model, and what the quantized model makes of them: f64[tokens, n]."""
    rng = np.random.default_rng(7)
    half = np.linalg.cholesky(np.float64(second_moment(32)))
    x = rng.standard_normal((4096, 32)) @ half.T
    return x, x @ (np.eye(32) + 0.1 * rng.standard_normal((32, 32))) + 0.05 * rng.standard_normal(x.shape)


@pytest.fixture(scope="module")
def crossed(inputs):
    x, x_q = inputs
    return tuple(jnp.asarray(a / len(x), jnp.float32) for a in (x_q.T @ x_q, (x - x_q).T @ x_q))


def explicit(w, H, cross, alpha, damping):
    """`corrected` from H itself, its columns in an order of their own."""
    order = jnp.asarray(np.random.default_rng(3).permutation(len(H)))
    c, _ = cholesky(H[order][:, order], damping)
    return corrected(w, cross, alpha, c, order)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_the_corrected_weight_is_the_explicit_one(alpha, crossed):
    H, cross = crossed
    w, _ = problem(ROWS, 32)
    w64, cross64 = float64(w, cross)
    expected = w64 + alpha * w64 @ cross64 @ np.linalg.inv(damped64(H, DAMPING))
    np.testing.assert_allclose(explicit(w, H, cross, alpha, DAMPING), expected, atol=1e-4)


def test_the_cross_term_is_off_at_alpha_zero_and_without_a_difference(crossed):
    H, cross = crossed
    w, _ = problem(ROWS, 32)
    np.testing.assert_array_equal(explicit(w, H, cross, 0.0, DAMPING), w)
    np.testing.assert_array_equal(explicit(w, H, jnp.zeros_like(cross), 1.0, DAMPING), w)
    fmt = qjax.format("int8_row")
    with_zero = round_weight(w, fmt, (nearest(), ldlq(cross=1.0)), Stats(H=H, cross=jnp.zeros_like(cross)))
    without = round_weight(w, fmt, (nearest(), ldlq()), Stats(H=H))
    np.testing.assert_array_equal(with_zero.codes, without.codes)


def test_the_full_cross_term_is_least_squares(inputs, crossed):
    x, x_q = inputs
    w, _ = problem(ROWS, 32)
    y = x @ np.float64(w).T
    expected = np.linalg.lstsq(x_q, y, rcond=None)[0].T
    ours = explicit(w, *crossed, 1.0, 1e-6)
    np.testing.assert_allclose(ours, expected, atol=1e-3)
    before, after = (np.linalg.norm(x_q @ np.float64(v).T - y) for v in (w, ours))
    assert after < 0.3 * before


def test_the_cross_term_brings_the_outputs_nearer(inputs, crossed):
    x, x_q = inputs
    H, cross = crossed
    w, _ = problem(ROWS, 32)
    fmt = qjax.format("int8_row")
    y = x @ np.float64(w).T

    def miss(alpha):
        r = round_weight(w, fmt, (nearest(), ldlq(cross=alpha)), Stats(H=H, cross=cross))
        return np.linalg.norm(x_q @ np.float64(fmt.decode(r.scales, r.codes)).T - y)

    assert miss(1.0) < 0.5 * miss(0.0)
