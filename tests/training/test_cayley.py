"""Cayley steps: against the closed form in float64, along the gradient of the manifold, and never off it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax.errors import UserError
from qjax.training.optim.cayley import cayley_sgd, cayley_step, drift, polished, tangent

N = 6
RNG = np.random.default_rng(0)
X = np.linalg.qr(RNG.standard_normal((N, N)))[0]
A, B = RNG.standard_normal((2, N, N))


def loss(X):
    """Not linear in X, as losses are not."""
    return np.sum((A @ X - B) ** 2) / N + np.sum(np.sin(X))


def loss_f32(X):
    """The same."""
    return jnp.sum((jnp.float32(A) @ X - jnp.float32(B)) ** 2) / N + jnp.sum(jnp.sin(X))


def gradient(X):
    return 2 / N * A.T @ (A @ X - B) + np.cos(X)


def skew(X, M):
    half = M @ X.T - 0.5 * X @ (X.T @ M @ X.T)
    return half - half.T


def cayley(X, W, a):
    eye = np.eye(N)
    return np.linalg.solve(eye - a / 2 * W, (eye + a / 2 * W) @ X)


def test_the_direction_is_the_gradient_along_the_manifold():
    """d/da L(Cayley(aW) X) at 0 by finite differences is <G, W' X> = -<W, W'> for every skew W', W of -G."""
    G, h = gradient(X), 1e-5
    W = skew(X, -G)
    np.testing.assert_allclose(tangent(jnp.float32(X), jnp.float32(-G)), W, rtol=1e-4, atol=1e-5)
    slope = (loss(cayley(X, W, h)) - loss(cayley(X, W, -h))) / (2 * h)
    assert slope == pytest.approx(-np.sum(W * W), rel=1e-6)
    other = skew(X, RNG.standard_normal((N, N)))
    slope = (loss(cayley(X, other, h)) - loss(cayley(X, other, -h))) / (2 * h)
    assert slope == pytest.approx(-np.sum(W * other), rel=1e-6)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.5])
def test_a_step_is_cayleys(rate):
    """Two rounds of the iteration and its polish: the closed form, up to the third order in a |W| / 2 <= 1/2."""
    G = gradient(X)
    W = skew(X, -G)
    a = min(rate, 1 / np.linalg.norm(W))
    new, M = cayley_step(jnp.float32(X), jnp.float32(-G), jnp.float32(rate))
    np.testing.assert_allclose(M, W @ X, rtol=1e-4, atol=1e-5)
    reach = (a * np.linalg.norm(W, 2) / 2) ** 4
    assert np.abs(np.asarray(new) - cayley(X, W, a)).max() <= 2 * reach + 1e-6
    assert float(drift(new)) < 1e-6


def test_it_descends_a_stack_and_stays_orthogonal():
    matrices = {"r": jnp.stack([jnp.float32(X), jnp.eye(N)])}
    optimizer = cayley_sgd(optax.linear_schedule(1.5, 0.0, 200), momentum=0.5)
    of = lambda m: jnp.sum(jax.vmap(loss_f32)(m["r"]))  # noqa: E731

    @jax.jit
    def step(m, state):
        updates, state = optimizer.update(jax.grad(of)(m), state, m)
        return optax.apply_updates(m, updates), state

    state, first, off = optimizer.init(matrices), float(of(matrices)), []
    for _ in range(200):
        matrices, state = step(matrices, state)
        off.append(float(drift(matrices["r"])))
    G = [gradient(np.asarray(x, np.float64)) for x in matrices["r"]]
    assert max(off) < 1e-5 and float(of(matrices)) < first - 1
    assert max(np.linalg.norm(skew(np.asarray(x, np.float64), g)) for x, g in zip(matrices["r"], G, strict=True)) < 1e-2


def test_polished_takes_drift_back():
    bent = jnp.float32(X) + 1e-3 * jnp.float32(A)
    assert float(drift(bent)) > 1e-3 > 1e-5 > float(drift(polished(bent)))


def test_bad_input():
    with pytest.raises(UserError, match=r"r: a rotation is a square matrix, and its shape is \[3, 4\]"):
        cayley_sgd().init({"r": jnp.zeros((3, 4))})
    with pytest.raises(UserError, match="momentum lies from 0"):
        cayley_sgd(momentum=1.0)
