"""Formats that no rounding knows, by the protocol alone through every stage: lattice, trellis; and lut2's tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, problem
from rounding_toys import E8, Few, Trellis

import qjax
from qjax.errors import UserError
from qjax.rounding import check_grid, clip, descend, ldlq, learned, learned_clipping, nearest, refit, round_weight, spqr
from qjax.rounding.protocol import DAMPING, State
from qjax.rounding.refit import refitted
from qjax.stats import Stats

ROWS, N = 32, 128
TOYS = {"E8": E8(), "trellis": Trellis(), "table": qjax.format("lut2")}
STAGES = {  # what stands before it, and the stage
    "nearest": ("", nearest()),
    "clip": ("nearest", clip(5)),
    "clipping": ("nearest", learned_clipping(5)),
    "ldlq": ("nearest", ldlq("act")),
    "descend": ("ldlq", descend(1)),
    "refit": ("descend", refit(1)),
    "learned": ("ldlq", learned(40)),
    "spqr": ("", spqr(0.5)),
    "spqr descend": ("spqr", descend(1)),
    "spqr refit": ("spqr descend", refit(1)),
}


CHAINS = (spqr(float("inf")),), (nearest(), ldlq())


@pytest.fixture(scope="module")
def w_H():
    return problem(ROWS, N)


@pytest.fixture(scope="module")
def states(w_H):
    """{toy: {stage: (state, w_hat)}}, a program for each toy."""

    def run(fmt, w, H):
        found = {"": State(None, None, w, jnp.float32(DAMPING))}
        for key, (behind, stage) in STAGES.items():
            stage.check(fmt)
            found[key] = stage(found[behind], fmt, Stats(H=H))
        return {key: (found[key], fmt.decode(found[key].scales, found[key].codes)) for key in STAGES}

    return {name: jax.jit(run, static_argnums=0)(fmt, *w_H) for name, fmt in TOYS.items()}


def loss_of(name, states, key, w, H):
    state, w_hat = states[name][key]
    w_hat = w_hat if state.outliers is None else jnp.where(*state.outliers, w_hat)
    units = losses(w, w_hat, damped64(H, DAMPING)).reshape(-1, TOYS[name].rows)
    return units.sum(axis=1)


@pytest.mark.parametrize("name", TOYS)
def test_every_stage_takes_it(name, states, w_H):
    fmt = TOYS[name]
    loss = {key: loss_of(name, states, key, *w_H) for key in STAGES}
    for key, (behind, _) in STAGES.items():
        state, w_hat = states[name][key]
        assert np.isfinite(np.asarray(w_hat)).all()
        again = fmt.decode(*fmt.unpack(fmt.pack(state.scales, state.codes)))
        np.testing.assert_array_equal(again, w_hat)
        if key in ("descend", "refit", "learned", "spqr descend", "spqr refit"):
            assert (loss[key] <= loss[behind] * (1 + 1e-5)).all()
    assert loss["ldlq"].sum() < 0.9 * loss["nearest"].sum()
    assert loss["descend"].sum() < 0.995 * loss["ldlq"].sum()
    assert loss["refit"].sum() < 0.995 * loss["descend"].sum()
    assert loss["learned"].sum() < loss["ldlq"].sum()
    assert loss["spqr"].sum() < loss["ldlq"].sum()
    if fmt.rows == 1:  # 16 rows at once, outliers among them, gain nothing from a pass
        assert loss["spqr refit"].sum() < 0.999 * loss["spqr"].sum()


@pytest.mark.parametrize("name", TOYS)
def test_the_outliers_go_on(name, states):
    """Which they are stays, what they are may change, and the codes beneath do not count."""
    first, last = (states[name][key][0].outliers for key in ("spqr", "spqr refit"))
    np.testing.assert_array_equal(first[0], last[0])
    assert 0 < np.mean(np.asarray(first[0])) < 0.2
    moved = (np.asarray(first[1]) != np.asarray(last[1]))[np.asarray(first[0])]
    assert moved.any() or TOYS[name].rows > 1


def test_codes_come_out_of_the_sweep(w_H):
    """No second search recovers them: a Viterbi would run twice."""

    class Once(Few):
        def nearest(self, scales, w):
            raise AssertionError("searched again")

    w, H = w_H
    fmt, stats = Few(), Stats(H=H)
    state = nearest()(State(None, None, w, jnp.float32(DAMPING)), fmt, stats)
    for stage in (ldlq(), descend(), refit(), learned(2)):
        state = stage(state, Once(), stats)
    r = spqr()(State(None, None, w, jnp.float32(DAMPING)), Once(), stats)
    assert r.outliers is not None


def test_a_table_is_refitted_to_what_least_squares_says(states, w_H):
    """Four entries a row, free as stored: the refit's table is the solution of float64 for its codes."""
    w, H = w_H
    state = states["table"]["descend"][0]
    new = jax.jit(lambda s: refitted(s, TOYS["table"], jnp.asarray(damped64(H, DAMPING), jnp.float32), 0))(state)
    codes, H64 = np.asarray(state.codes), damped64(H, DAMPING)
    for row in range(0, ROWS, 8):
        B = np.float64(codes[row] == np.arange(4)[:, None])
        table = np.linalg.solve(B @ H64 @ B.T, B @ H64 @ np.float64(w[row]))
        np.testing.assert_allclose(np.asarray(new.scales["table"])[row, 0], table, rtol=2e-3, atol=2e-3)


def test_a_tile_is_rounded_in_its_own_metric():
    """E8's two cosets, told apart by H among the tile's eight columns and not by the distance."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 8)) * np.geomspace(1, 30, 8)
    M = jnp.asarray(x.T @ x, jnp.float32)
    u = jnp.asarray(rng.standard_normal((64, 1, 8)), jnp.float32)
    columns = (jnp.ones((64, 1)), None)
    plain, own = (E8().round(columns, u, metric)[0] for metric in (None, M))
    errors = [np.float64(q - u)[:, 0] for q in (plain, own)]
    in_metric = [np.einsum("ri,ij,rj->r", e, np.float64(M), e) for e in errors]
    assert (in_metric[1] <= in_metric[0] * (1 + 1e-5)).all() and in_metric[1].sum() < 0.9 * in_metric[0].sum()


@pytest.mark.slow
def test_the_trellis_closes_and_is_near_the_best_of_tiny_ones():
    """Decoded from one bit a weight alone; against all rings of a trellis small enough to try them."""
    rng = np.random.default_rng(1)
    fmt = Trellis()
    u = jnp.asarray(rng.standard_normal((4, 16, 16)), jnp.float32)
    value, code = fmt.round((jnp.ones((4, 16)), None), u)
    assert set(np.unique(code)) <= {0, 1}
    again = fmt.basis(code.transpose(1, 0, 2).reshape(16, 64))[0].reshape(16, 4, 16).transpose(1, 0, 2)
    np.testing.assert_array_equal(again, value)
    mse = float(jnp.mean((value - u) ** 2))
    assert mse < 0.355  # one bit a weight: 0.363 is the best that two levels can, D(R) 0.25


@pytest.mark.parametrize("name", TOYS)
def test_it_is_a_tensor_like_any(name, w_H):
    w, _ = w_H
    fmt = TOYS[name]
    q = qjax.quantize(w, fmt)
    assert q.shape == w.shape
    np.testing.assert_array_equal(qjax.dequantize(q), fmt.decode(*fmt.encode(w)))
    if fmt.rows > 1:
        with pytest.raises(UserError, match="trellis holds 16 rows together, and got 24"):
            qjax.quantize(w[:24], fmt)


@pytest.mark.parametrize("name", TOYS)
def test_spqr_without_outliers_is_ldlq(name, w_H):
    w, H = w_H
    ours, theirs = (round_weight(w, TOYS[name], chain, Stats(H=H)).codes for chain in CHAINS)
    assert np.mean(np.asarray(ours) != np.asarray(theirs)) < 1e-3


def test_what_would_throw_codes_away_is_refused():
    fmt = qjax.format("Q4_0")
    for chain in ((spqr(), ldlq()), (spqr(), clip()), (nearest(), ldlq(), clip()), (nearest(), descend(), ldlq())):
        with pytest.raises(UserError):
            check_grid(chain, fmt)
    check_grid((spqr(), descend(), refit()), fmt)
    check_grid((nearest(), clip(), ldlq(), descend()), fmt)


@pytest.mark.parametrize("stages", [(ldlq("natural"),), (ldlq("natural"), descend(2))], ids=["ldlq", "descend"])
def test_feedback_and_descent_hand_over_the_metric_of_a_tile(stages, w_H):
    """Who listens to it loses less than who takes the nearest point."""

    class Deaf(E8):
        def round(self, columns, target, metric=None):
            return E8.round(self, columns, target, None)

    w, H = w_H
    deaf, hearing = (float(round_weight(w, fmt, (nearest(), *stages), Stats(H=H)).loss) for fmt in (Deaf(), E8()))
    assert hearing < 0.97 * deaf
