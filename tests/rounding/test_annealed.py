"""Codes by annealing: each step the best of its weight, what a round gains, what is kept, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, marked, problem, second_moment, staged

import qjax
from qjax.errors import UserError
from qjax.rounding import annealed, check_grid, ldlq, nearest, refit
from qjax.rounding.annealed import Slope, best_share
from qjax.rounding.protocol import DAMPING, rounded_of


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_a_weight_takes_the_share_of_least_loss(t):
    """(t_j - mu)^2 + t v over all shares of both levels beside its own, looked for on a fine line."""
    q, above, below = 0.5, 2.0, -0.25
    target = np.linspace(-1.0, 3.0, 41)
    column = [jnp.full(41, v, jnp.float32) for v in (q, above, below)]
    s = np.float64(best_share(jnp.asarray(target, jnp.float32), *column, jnp.float32(t)))
    p = np.linspace(0.0, 1.0, 2001)[None]
    cost = [(target[:, None] - q - p * (far - q)) ** 2 + t * p * (1 - p) * (far - q) ** 2 for far in (above, below)]
    far = np.where(s > 0, above - q, below - q)
    found = (target - q - np.abs(s) * far) ** 2 + t * np.abs(s) * (1 - np.abs(s)) * far**2
    np.testing.assert_allclose(found, np.minimum(*(c.min(axis=1) for c in cost)), atol=2e-6)
    assert t < 1 or set(np.unique(s)) == {-1.0, 0.0, 1.0}


def test_a_weight_goes_further_than_there_but_not_beyond_its_levels():
    column = [jnp.full((4, 1), v, jnp.float32) for v in (0.0, 1.0, -2.0)]
    share, target = jnp.asarray([[0.0], [0.5], [0.5], [-0.5]]), jnp.asarray([0.4, 0.9, -2.0, 0.5])[:, None, None]
    mu, new = Slope(jnp.float32(0.0)).round((*column, share), target)
    np.testing.assert_allclose(new[:, 0, 0], [0.72, 1.0, -1.0, 1.0], atol=1e-6)  # 1.8 times as far
    np.testing.assert_allclose(mu[:, 0, 0], [0.72, 1.0, -2.0, 1.0], atol=1e-6)


def test_it_gains_where_descent_has_stopped():
    """Behind a refit, against as many rounds of it; and on inputs that were not seen."""
    (w, H), fmt = problem(32, 256), qjax.format("uint2_g64")
    other = second_moment(256, 0, tokens=8192)
    _, _, before, longer, after = staged(w, H, fmt, nearest("h"), ldlq(), refit(2, 2), refit(8, 2), annealed(16))
    first, more, last = (losses(w, rounded_of(s, fmt), damped64(H, DAMPING)).sum() for s in (before, longer, after))
    assert last < 0.9 * more < 0.9 * first
    seen, unseen = (losses(w, rounded_of(s, fmt), other).sum() for s in (longer, after))
    assert unseen < 0.95 * seen


KINDS = ("Q3_K", "Q2_K", "IQ4_NL", "NF4_dq", "FP8_E4M3", "int3_g16_mse_u6x16", "lut2")


@pytest.mark.parametrize("name", marked(KINDS, ("Q3_K",)))
def test_never_a_larger_loss_and_as_it_is_stored(name):
    (w, H), fmt = problem(16, 512), qjax.format(name)
    _, before, after = staged(w, H, fmt, nearest("h"), ldlq(), annealed(32))
    old, new = (losses(w, rounded_of(s, fmt), damped64(H, DAMPING)) for s in (before, after))
    if fmt.rows == 0:
        old, new = old.sum(), new.sum()
    assert (new <= old * (1 + 1e-5)).all() and new.sum() < 0.99 * old.sum()
    again = fmt.unpack(fmt.pack(after.scales, after.codes))
    for a, b in zip(jax.tree.leaves((after.scales, after.codes)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_has_no_levels_beside_says_so():
    for name, why in (("E8P_2", "rounds 1 x 8 weights together"), ("F16", "has no scales")):
        with pytest.raises(UserError, match=f"w: annealed: {name} {why}"):
            check_grid((nearest(), annealed()), qjax.format(name), "w")
    with pytest.raises(UserError, match="rounds must be at least 1, got 0"):
        annealed(0)
    assert annealed().requires == {"H"} and hash(annealed()) == hash(annealed(32))
