"""What each stage brings, in float64, and what its guard holds back: "never worse" alone passes where nothing is done.

The grids are toys whose scales are stored so coarsely that a step which looks good may be bad once it is stored.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, second_moment
from rounding_toys import Few

import qjax
from qjax.rounding import clip, learned_clipping, nearest, refit
from qjax.rounding.protocol import State, metric
from qjax.rounding.refit import refitted
from qjax.stats import Stats

ROWS = 24
DAMPING = 0.3  # so much that a metric without it is another one


class Coarse(Few):
    """Scales are rounded down to powers of two."""

    def fit(self, w, weight=None):
        return self.store(None, (super().fit(w)["s"], None))

    def store(self, scales, columns):
        return {"s": 2.0 ** jnp.floor(jnp.log2(jnp.maximum(columns[0], 1e-6)))}


class Loose(Few):
    """Scales are stored as powers of two, but not as they are fitted: storing moves them, as it moves NF4_dq's."""

    def store(self, scales, columns):
        return {"s": 2.0 ** jnp.round(jnp.log2(jnp.maximum(columns[0], 1e-6)))}


class Tied(Few):
    """Scales of a row's groups are stored as their mean."""

    def fit(self, w, weight=None):
        return self.store(None, (super().fit(w)["s"] / 0.7, None))

    def store(self, scales, columns):
        s = columns[0]
        return {"s": jnp.broadcast_to(jnp.mean(s, axis=-1, keepdims=True), s.shape)}


LEVELS = (-1.5, -0.5, 0.5, 1.5)


def problem(n):
    w = np.random.default_rng(0).standard_normal((ROWS, n))
    return jnp.asarray(w, jnp.float32), jnp.asarray(second_moment(n, tokens=4 * n))


def started(w, fmt):
    return nearest()(State(None, None, w, jnp.float32(DAMPING)), fmt, Stats())


def staged(stage, state, fmt, H):
    return jax.jit(lambda state, H: stage(state, fmt, Stats(H=H)))(state, H)


def loss_of(state, fmt, H):
    """Damped, f64[rows]."""
    return losses(state.target, fmt.decode(state.scales, state.codes), damped64(H, DAMPING))


@pytest.fixture(scope="module")
def one_group():
    """Rows of a single group with an offset: the state of nearest, H, and the least loss of any (s, m) at its codes."""
    w, H = problem(16)
    fmt = qjax.format("uint2_g16_f32_zf16")
    start, M = started(w, fmt), damped64(H, DAMPING)
    least = {"s": [], "s, m": []}
    for x, t in zip(np.float64(w), np.float64(start.codes), strict=True):
        z = np.float64(start.scales["zero"])[len(least["s"]), 0]
        for name, A in (("s", np.stack([t - z])), ("s, m", np.stack([t, np.ones_like(t)]))):
            e = x - np.linalg.solve(A @ M @ A.T, A @ M @ x) @ A
            least[name].append(e @ M @ e)
    return fmt, start, H, {name: np.array(found) for name, found in least.items()}


def test_refitted_scales_and_offsets_are_least_squares(one_group):
    fmt, start, H, least = one_group
    after = jax.jit(lambda s, H: refitted(s, fmt, metric(s, Stats(H=H)), 0))(start, H)
    np.testing.assert_array_equal(after.codes, start.codes)
    np.testing.assert_allclose(loss_of(after, fmt, H), least["s, m"], rtol=1e-3)
    assert least["s"].sum() > 1.1 * least["s, m"].sum()


def test_refit_goes_below_all_scales_at_the_codes_it_was_given(one_group):
    """Which no fit of scales and offsets alone can: its codes move too."""
    fmt, start, H, least = one_group
    after = staged(refit(1), start, fmt, H)
    assert loss_of(after, fmt, H).sum() < 0.8 * least["s, m"].sum()


def test_refit_leaves_steps_that_are_bad_once_stored():
    w, H = problem(16)
    fmt = Coarse(LEVELS)
    start = started(w, fmt)
    before, after = (loss_of(s, fmt, H) for s in (start, staged(refit(), start, fmt, H)))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.75 * before.sum()


def test_clip_keeps_rows_that_lose_once_their_scales_are_stored_together():
    w, H = problem(32)
    fmt = Tied(LEVELS)
    start = started(w, fmt)
    after = staged(clip(metric="none"), start, fmt, H)

    def error(state):
        return ((np.float64(w) - np.float64(fmt.decode(state.scales, state.codes))) ** 2).sum(axis=1)

    before, now = error(start), error(after)
    assert (now <= before * (1 + 1e-5)).all()
    assert now.sum() < 0.9 * before.sum()


def test_learned_keeps_rows_that_found_nothing_better():
    """Storing alone would move their scales."""
    w, H = problem(16)
    fmt = Loose(LEVELS)
    start = started(w, fmt)
    after = staged(learned_clipping(20, lr=0.1), start, fmt, H)
    before, now = loss_of(start, fmt, H), loss_of(after, fmt, H)
    assert (now <= before * (1 + 1e-5)).all()
    assert now.sum() < 0.9 * before.sum()
    kept = np.asarray(after.scales["s"] == start.scales["s"]).all(axis=1)
    assert 0 < kept.sum() < ROWS


def test_nearest_by_h_errs_where_inputs_are_small():
    w = problem(64)[0]
    h = np.random.default_rng(1).lognormal(0, 2, 64)
    fmt, stats = qjax.format("NF4"), Stats(h=jnp.asarray(h, jnp.float32))
    error = {}
    for weight in ("none", "h"):
        made = nearest(weight)(State(None, None, w, jnp.float32(DAMPING)), fmt, stats)
        error[weight] = (h * (np.float64(w) - np.float64(fmt.decode(made.scales, made.codes))) ** 2).sum()
    assert error["h"] < 0.8 * error["none"]
