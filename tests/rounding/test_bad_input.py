"""Statistics that are not what they should be, and chains that make no sense."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from rounding_problems import damped64, factor, losses, marked, problem, with_eigenvalue

import qjax
from qjax.errors import UserError
from qjax.pipeline.rounded import round_leaf
from qjax.recipes import recipe
from qjax.rounding import (
    check_chain,
    clip,
    codebooks,
    descend,
    ldlq,
    learned,
    learned_clipping,
    nearest,
    neighbours,
    refit,
    round_weight,
)
from qjax.rounding.curvature import damped, descent
from qjax.stats import Stats

ROWS, N = 8, 256
FORMAT = qjax.format("uint4_g32")
FEEDBACK = (nearest(), ldlq())
BEST = (nearest("h"), ldlq(), descend(), refit())


def run(H, chain=FEEDBACK, w=None, **stats):
    w = problem(ROWS, N)[0] if w is None else w
    return round_weight(w, FORMAT, chain, Stats(H=jnp.asarray(H, jnp.float32), **stats))


def w_hat_of(r):
    return np.asarray(FORMAT.decode(r.scales, r.codes))


# the ladder


@pytest.mark.parametrize(
    "eigenvalue, damping",
    [(0.1, 0.05), (0.0, 0.05), (-0.03, 0.05), (-0.08, 0.1), (-0.15, 0.2), (-0.3, 0.4), (-0.7, 0.8), (-1.5, 1.6)],
)
def test_the_least_damping_that_suffices_is_taken_and_reported(eigenvalue, damping):
    channels = np.random.default_rng(0).lognormal(0, 2, N)  # of no influence
    r = run(with_eigenvalue(N, eigenvalue) * np.outer(channels, channels))
    assert float(r.damping) == pytest.approx(damping)
    assert np.isfinite(w_hat_of(r)).all()


@pytest.mark.parametrize("chain", [FEEDBACK, BEST], ids=["ldlq", "best"])
def test_an_indefinite_H_is_told_by_a_damping_that_is_not_a_number(chain):
    assert np.isnan(float(run(with_eigenvalue(N, -5.0), chain).damping))


def test_the_ladder_is_climbed_with_a_cross_term_too():
    """A finite damping promises codes of finite targets."""
    H = with_eigenvalue(N, -0.08)
    w = problem(ROWS, N)[0]
    cross = jnp.asarray(0.01 * np.random.default_rng(0).standard_normal((N, N)), jnp.float32)
    r = run(H, (nearest(), ldlq(cross=1.0)), cross=cross)
    assert float(r.damping) == pytest.approx(0.1)
    e = w_hat_of(r) - np.asarray(w)
    assert np.sqrt((e**2).mean()) < 0.5 * np.sqrt((np.asarray(w) ** 2).mean())


def test_nan_in_H_is_told_by_the_damping():
    H = np.array(problem(ROWS, N)[1])
    H[3, 5] = H[5, 3] = np.nan
    assert np.isnan(float(run(H).damping))


# columns without input


def test_dead_columns_are_rounded_to_nearest_and_disturb_nobody():
    w, H = problem(ROWS, N)
    dead = np.zeros(N, bool)
    dead[[0, 7, 40, 255]] = True
    H = np.where(dead[:, None] | dead[None, :], 0, H)
    calm = jnp.where(dead[None], 0.1 * w, w)  # moves no group's ends
    r = run(H, w=calm)
    near = np.asarray(FORMAT.nearest(r.scales, calm))
    np.testing.assert_array_equal(np.asarray(r.codes)[:, dead], near[:, dead])
    assert (np.asarray(r.codes)[:, ~dead] != near[:, ~dead]).any()

    other = run(H, w=jnp.where(dead[None], -0.1 * w, w))
    np.testing.assert_array_equal(np.asarray(other.codes)[:, ~dead], np.asarray(r.codes)[:, ~dead])
    assert np.isfinite(float(r.damping))


def test_dead_columns_ask_for_nothing_in_a_descent():
    H = np.array(problem(ROWS, 8)[1])
    H[3] = H[:, 3] = 0
    coupling = np.asarray(descent(damped(jnp.asarray(H), 0.1)))
    expected = damped64(H, 0.1)
    expected = expected / np.where(np.diag(expected) > 0, np.diag(expected), 1) * (1 - np.eye(8))
    np.testing.assert_allclose(coupling, expected, atol=1e-5)
    assert not coupling[3].any() and not coupling[:, 3].any()


@pytest.mark.parametrize("chain", [FEEDBACK, BEST], ids=["ldlq", "best"])
def test_an_H_of_zeros_leaves_the_nearest_codes(chain):
    w = problem(ROWS, N)[0]
    r = run(np.zeros((N, N)), chain)
    np.testing.assert_array_equal(r.codes, FORMAT.nearest(r.scales, w))
    assert float(r.loss) == 0 and np.isfinite(float(r.damping))


@pytest.mark.parametrize("chain", [FEEDBACK, BEST], ids=["ldlq", "best"])
def test_one_token_is_enough_for_a_finite_result(chain):
    x = np.random.default_rng(0).standard_normal(N)
    w = problem(ROWS, N)[0]
    r = run(np.outer(x, x), chain)
    assert np.isfinite(w_hat_of(r)).all() and float(r.damping) == pytest.approx(0.05)
    assert float(r.loss) <= float(r.first_loss)
    assert losses(w, w_hat_of(r), np.outer(x, x)).sum() / losses(w, 0 * w, np.outer(x, x)).sum() < 1e-3


def test_a_diagonal_below_noise_is_told_though_the_factor_exists():
    """Damping lifts it, so Cholesky sees nothing wrong; no E[x^2] is negative but by rounding, 1e-7 of the largest."""
    h = np.array([4.0, 2.0, 1.0, 0.5])
    for least, told in ((-1e-3, True), (-1e-7, False)):
        L, damping = factor(jnp.asarray(np.diag([*h, least]), jnp.float32), 0.05)
        assert np.isnan(float(damping)) == told and np.isnan(np.asarray(L)).any() == told


# the size of H


@pytest.mark.sampled(5)
@pytest.mark.parametrize("size", [1e-20, 2.0**-66, 2.0**66, 1e20])
@pytest.mark.parametrize("stage", [ldlq(), descend(), refit()], ids=["ldlq", "descend", "refit"])
def test_the_size_of_H_does_not_matter(stage, size):
    H = problem(ROWS, N)[1]
    chain = (nearest("h"), stage)
    one, other = run(H, chain), run(H * size, chain)
    assert float(other.loss) == pytest.approx(float(one.loss), rel=1e-3)
    different = np.mean(np.asarray(one.codes) != np.asarray(other.codes))
    assert different == 0 if np.log2(size).is_integer() else different < 0.01  # powers of two change no digit


def test_the_factor_follows_the_scales_of_channels():
    """x -> D x makes of L D^-1 ... D: the damping does not know of channel scales."""
    H = problem(ROWS, N)[1]
    d = jnp.asarray(np.random.default_rng(0).lognormal(0, 3, N), jnp.float32)
    feedback, damping = factor(H, 0.05)
    scaled, same = factor(H * d[:, None] * d[None, :], 0.05)
    assert damping == same
    np.testing.assert_allclose(scaled * d[None, :] / d[:, None], feedback, atol=1e-5)


# chains


@pytest.mark.parametrize(
    "chain, stats, word",
    [
        ((), Stats(), "at least one"),
        ((nearest("h"),), Stats(), "'h'"),
        ((nearest(), ldlq()), Stats(h=jnp.ones(N)), "'H'"),
        ((nearest(), descend()), Stats(), "'H'"),
        ((nearest(), refit()), Stats(), "'H'"),
        ((nearest(), ldlq(cross=0.5)), Stats(H=jnp.eye(N)), "'cross'"),
    ],
)
def test_what_a_chain_lacks_is_named(chain, stats, word):
    with pytest.raises(UserError, match=word):
        check_chain(chain, FORMAT, stats)


def test_the_weight_is_named():
    with pytest.raises(UserError, match="blocks/3/up"):
        check_chain(FEEDBACK, FORMAT, Stats(), "blocks/3/up")


@pytest.mark.parametrize("chain", [(nearest(),), (nearest("h"),), BEST, (nearest(), ldlq("group", "dynamic"))])
def test_a_chain_with_all_it_needs_passes(chain):
    check_chain(chain, FORMAT, Stats(H=jnp.eye(N)))


def test_importance_alone_is_enough_for_the_weighted_fit():
    check_chain((nearest("h"),), FORMAT, Stats(h=jnp.ones(N)))


@pytest.mark.parametrize("chain", [(ldlq(),), (descend(), nearest()), (refit(),)], ids=["ldlq", "descend", "refit"])
def test_the_first_stage_must_fit_the_scales(chain):
    with pytest.raises(UserError, match="nearest"):
        check_chain(chain, FORMAT, Stats(H=jnp.eye(N)))


@pytest.mark.parametrize("before", [ldlq("natural"), descend(), refit(), learned()], ids=str)
def test_feedback_does_not_throw_codes_away(before):
    with pytest.raises(UserError, match=f"up: LDLQ.*throw away the codes of {type(before).__name__}"):
        check_chain((nearest(), before, ldlq()), FORMAT, Stats(H=jnp.eye(N)), "up")


@pytest.mark.parametrize(
    "chain, name, word",
    [
        ((nearest(), neighbours()), "E8P_2", "no block of E8P_2 .* leave the stage out"),
        ((nearest(), codebooks()), "Q4_0", "no codebook to solve for; take one such as aqlm_2x8_g8"),
        ((nearest(), ldlq("natural", "dynamic")), "NF4_dq", "grid='dynamic' means nothing"),
        ((ldlq(),), "Q4_0", "as nearest.. does"),
    ],
)
def test_a_chain_called_alone_is_refused_as_a_recipe_is(chain, name, word):
    with pytest.raises(UserError, match=word):
        round_weight(problem(ROWS, N)[0], qjax.format(name), chain, Stats(H=jnp.eye(N)))


def test_a_chain_called_alone_says_which_statistic_it_lacks():
    with pytest.raises(UserError, match="'H'"):
        round_weight(problem(ROWS, N)[0], FORMAT, (nearest(), descend()), Stats(h=jnp.ones(N)))


def test_feedback_may_follow_what_chose_ranges_alone():
    check_chain((nearest(), clip(), learned_clipping(), ldlq(), refit()), FORMAT, Stats(H=jnp.eye(N)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("of", ["h", "H"])
def test_importance_that_is_none_is_refused(of, value):
    """A mean of squares, given or as the diagonal of H."""
    h = jnp.ones(N).at[5].set(value)
    stats = Stats(h=h) if of == "h" else Stats(H=jnp.diag(h))
    with pytest.raises(UserError, match="up: the statistic 'h' has 1 values that are NaN, infinite or negative"):
        round_leaf("up", problem(ROWS, N)[0], -1, FORMAT, recipe("imatrix"), stats)


@pytest.mark.parametrize("name", ["int8_row", "FP8_E4M3", "FP8_E4M3_tensor", "NF4_dq", "F16", "int3_g16_mse_u4xrow"])
def test_a_dynamic_grid_needs_blocks_that_stand_alone(name):
    with pytest.raises(UserError, match=name):
        check_chain((nearest(), ldlq("natural", "dynamic")), qjax.format(name), Stats(H=jnp.eye(N)))


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: ldlq(order="act", grid="dynamic"), "act order tears blocks apart"),
        (lambda: ldlq(order="best"), "'best'"),
        (lambda: ldlq(grid="fixed"), "'fixed'"),
        (lambda: nearest(weight="H"), "'H'"),
        (lambda: descend(0), "at least 1"),
        (lambda: refit(0), "at least 1"),
        (lambda: refit(1, 0), "at least 1"),
    ],
)
def test_a_stage_refuses_what_it_does_not_know(make, word, monkeypatch):
    """Outside the tests, where no type checker comes first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=word):
        make()


@pytest.mark.parametrize("stage", marked([descend(), refit()], [descend()]), ids=str)
def test_stages_without_a_factor_also_tell_of_an_indefinite_H(stage):
    """tr(E H E^T) has no least value then: whatever a descent finds is not to be used."""
    assert np.isnan(float(run(with_eigenvalue(N, -5.0), (nearest(), stage)).damping))


def test_a_stack_of_H_climbs_each_its_own_ladder():
    H = jnp.stack([jnp.asarray(with_eigenvalue(N, v)) for v in (0.1, -0.08, -5.0)])
    _, damping = jax.jit(jax.vmap(lambda H: factor(H, 0.05)))(H)
    np.testing.assert_allclose(damping, [0.05, 0.1, np.nan], rtol=1e-6)
