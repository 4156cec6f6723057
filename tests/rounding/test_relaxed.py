"""Codes by relaxation: candidates, the loss that is relaxed, what it gains, and what has none."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, marked, problem, second_moment, staged
from rounding_toys import Few

import qjax
from qjax.errors import UserError
from qjax.rounding import annealed, check_grid, ldlq, nearest, refit, relaxed, spqr
from qjax.rounding.protocol import DAMPING, State, rounded_of
from qjax.rounding.relaxed import candidates, moments
from qjax.stats import Stats

WITHOUT_SCALES = ("F32", "F16", "BF16")
SINGLE = [n for n in qjax.format_names() if qjax.format(n).tile == (1, 1) and n not in WITHOUT_SCALES]
COARSE = ("Q2_K", "Q3_K", "uint2_g64", "uint3_g64_mse", "int3_g16_mse_u6x16", "IQ4_NL")


@pytest.mark.parametrize("name", marked(SINGLE, ("Q3_K",)))
def test_never_a_larger_loss_and_as_it_is_stored(name):
    (w, H), fmt = problem(16, 512), qjax.format(name)
    _, before, after = staged(w, H, fmt, nearest("h"), ldlq(), relaxed(120))
    old, new = (losses(w, fmt.decode(s.scales, s.codes), damped64(H, DAMPING)) for s in (before, after))
    if fmt.rows == 0:
        old, new = old.sum(), new.sum()
    assert (new <= old * (1 + 1e-5)).all()
    assert name not in COARSE or new.sum() < 0.98 * old.sum()
    again = fmt.unpack(fmt.pack(after.scales, after.codes))
    for a, b in zip(jax.tree.leaves((after.scales, after.codes)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_gains_where_descent_has_stopped():
    """Behind a refit whose next rounds gain little, and on inputs that were not seen."""
    (w, H), fmt = problem(32, 256), qjax.format("uint2_g64")
    other = second_moment(256, 0, tokens=8192)
    _, _, before, more, after = staged(w, H, fmt, nearest("h"), ldlq(), refit(4, 2), refit(2, 2), relaxed(200))
    states, metric = (before, more, after), damped64(H, DAMPING)
    first, longer, last = (losses(w, fmt.decode(s.scales, s.codes), metric).sum() for s in states)
    assert longer > 0.98 * first and last < 0.92 * first
    seen, unseen = (losses(w, fmt.decode(s.scales, s.codes), other).sum() for s in (before, after))
    assert unseen < 0.95 * seen


@pytest.mark.parametrize("levels", [(-1.0, 0.0, 1.0), (-1.5, -0.5, 0.5, 1.5)], ids=len)
def test_nearer_to_the_best_of_all_codes(levels):
    fmt, n, rows = Few(levels), 8, 64
    w = jnp.asarray(np.random.default_rng(0).standard_normal((rows, n)), jnp.float32)
    H = jnp.asarray(second_moment(n, tokens=64))
    before, after = staged(w, H, fmt, nearest(), relaxed(100))
    points = np.array(list(itertools.product(fmt.levels, repeat=n)))
    metric, least = damped64(H, DAMPING), np.empty(rows)
    for row in range(rows):  # on the scale that it has learned
        q = float(after.scales["s"][row, 0]) * points
        least[row] = losses(np.broadcast_to(np.float64(w[row]), q.shape), q, metric).min()
    first, last = (losses(w, fmt.decode(s.scales, s.codes), metric) for s in (before, after))
    assert (last >= least * (1 - 1e-5)).all() and (last <= first * (1 + 1e-5)).all()
    assert np.mean(last <= least * 1.001) > 0.5 and last.sum() < 1.1 * least.sum()


def test_the_relaxed_loss_is_the_expected_one():
    """E H E^T at the mean and the diagonal of H times the variance: the mean over all draws of three candidates."""
    rng, n = np.random.default_rng(0), 5
    z, q = rng.standard_normal((2, 3, 1, n))
    w, H = rng.standard_normal(n), np.float64(second_moment(n))
    mean, variance = (np.float64(x)[0] for x in moments(jnp.asarray(z, jnp.float32), jnp.asarray(q, jnp.float32)))
    p = np.exp(z) / np.exp(z).sum(axis=0)
    expected = 0.0
    for draw in itertools.product(range(3), repeat=n):
        e = w - q[draw, 0, range(n)]
        expected += p[draw, 0, range(n)].prod() * (e @ H @ e)
    assert (w - mean) @ H @ (w - mean) + np.diag(H) @ variance == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", marked(("Q3_K", "uint3_g64_mse", "NF4", "FP8_E4M3_b128", "lut2"), ("Q3_K", "lut2")))
def test_candidates_are_the_levels_beside(name):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)), jnp.float32)
    fmt = qjax.format(name)
    scales, codes = fmt.encode(w)
    state = State(scales, codes, w, jnp.float32(DAMPING))
    found, real = map(np.asarray, jax.jit(lambda s: candidates(s, fmt))(state))
    assert codes.dtype == found.dtype
    q = np.stack([fmt.decode(scales, jnp.asarray(c)) for c in found])
    np.testing.assert_array_equal(q[0], rounded_of(state, fmt))
    dense = jnp.linspace(-1.5, 1.5, 20_001, dtype=jnp.float32) * jnp.max(jnp.abs(w))
    line = jnp.broadcast_to(dense[:, None], (len(dense), 256))

    @jax.jit
    def all_of(row):
        """What the weights of a row can be."""
        one = jax.tree.map(lambda a: jnp.broadcast_to(a[row][None], (len(dense), *a.shape[1:])), scales)
        return fmt.decode(one, fmt.nearest(one, line))

    for row, column in ((0, 0), (1, 70), (2, 140), (3, 255)):
        levels = np.unique(np.asarray(all_of(row))[:, column])
        at = np.argmin(np.abs(levels - q[0, row, column]))
        above, below = levels[min(at + 1, len(levels) - 1)], levels[max(at - 1, 0)]
        np.testing.assert_allclose(q[:, row, column], [levels[at], above, below], rtol=1e-5)
        np.testing.assert_array_equal(real[:, row, column], [True, at + 1 < len(levels), at > 0])


@pytest.mark.parametrize("stage", [relaxed(60), pytest.param(annealed(32), marks=pytest.mark.slow)], ids=repr)
def test_outliers_stay_and_zeros_stay_finite(stage):
    (w, H), fmt = problem(16, 256), qjax.format("uint2_g64")
    w = w.at[0].set(0.0)
    before, after = staged(w, H, fmt, spqr(0.5), stage)
    np.testing.assert_array_equal(before.outliers[0], after.outliers[0])
    assert np.asarray(before.outliers[0]).any()
    old, new = (losses(w, rounded_of(s, fmt), damped64(H, DAMPING)) for s in (before, after))
    assert (new <= old * (1 + 1e-5)).all() and new.sum() < 0.96 * old.sum() and new[0] == 0


def test_what_has_no_levels_beside_says_so():
    for name, why in (("E8P_2", "rounds 1 x 8 weights together"), ("IQ2_XS", "together"), ("F16", "has no scales")):
        with pytest.raises(UserError, match=f"w: relaxed: {name} .*{why}|w: relaxed: {name} {why}"):
            check_grid((nearest(), relaxed()), qjax.format(name), "w")
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        relaxed(0)
    with pytest.raises(UserError, match=r"lr must be positive, got -1.0"):
        relaxed(lr=-1.0)
    assert relaxed().requires == {"H"} and hash(relaxed()) == hash(relaxed(300))
    with pytest.raises(UserError, match="'H'"):
        qjax.rounding.check_chain((nearest(), relaxed()), qjax.format("Q4_0"), Stats())
