"""What vector codes gain behind rotation and feedback, at the same two bits: single levels, E8P, a trellis."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.pipeline.rounded import round_leaf
from qjax.rounding import ldlq, nearest, round_weight
from qjax.rounding.protocol import DAMPING
from qjax.stats import Stats

ROWS, N = 64, 256


def problem():
    """Heavy-tailed weights, inputs of which a few channels are large and all go together."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2048, N)) @ (rng.standard_normal((N, N)) * np.geomspace(1, 0.05, N)[:, None]) / 16
    x[:, 7] *= 10
    return jnp.asarray(rng.standard_t(5, (ROWS, N)) * 0.02, jnp.float32), jnp.asarray(x.T @ x / 2048, jnp.float32)


def made(line):
    w, H = problem()
    recipe = qjax.recipe(line)
    q, report = round_leaf("w", w, -1, recipe.format, recipe, Stats(H=H))
    e = np.float64(w - qjax.dequantize(q))
    loss = np.einsum("ri,ij,rj->", e, np.float64(H), e) / np.einsum("ri,ij,rj->", *(np.float64(a) for a in (w, H, w)))
    assert report.loss == pytest.approx(loss, rel=1e-2)  # in the turned variables and in the weight's own
    return q, loss


def test_quip_sharp_is_below_single_levels_and_runs():
    q, loss = made("quip_sharp:E8P_2")
    levels, scalar = made("hadamard() >> int2_row_mid_mse >> nearest() >> ldlq() >> descend(10)")
    assert q.bits_per_weight == levels.bits_per_weight == 2 + 16 / N + 32 / (ROWS * N)  # a scale a row, a seed
    assert loss < 0.85 * scalar
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, N)), jnp.float32)
    np.testing.assert_allclose(qjax.dot(x, q), x @ qjax.dequantize(q).T, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_qtip_is_below_quip_sharp_and_more_states_are_better():
    (_, lattice), (_, small), (q, large) = map(
        made, ("quip_sharp:E8P_2", "qtip:trellis2_L8_mul1", "qtip:trellis2_L12_mul1")
    )
    assert large < lattice and large < 0.98 * small and q.bits_per_weight == 2 + 16 / N + 32 / (ROWS * N)


@pytest.mark.parametrize("name", ["E8P_3", "trellis2_L8_3inst"])
def test_feedback_gains_on_vectors_what_theory_promises(name):
    """LDLQ onto tiles of k columns: the loss falls from mse tr(H) to about mse tr(D), D the tiles of H = L D L^T."""
    w = jnp.asarray(np.random.default_rng(2).standard_normal((ROWS, N)), jnp.float32)
    H, fmt = problem()[1], qjax.format(name)
    H = H / jnp.sqrt(jnp.outer(jnp.diagonal(H), jnp.diagonal(H)))
    k = fmt.tile[1]
    c = np.linalg.cholesky(np.float64(H) + DAMPING * np.eye(N))
    promised = sum((c[i : i + k, i : i + k] ** 2).sum() for i in range(0, N, k)) / N / (1 + DAMPING)
    fed = round_weight(w, fmt, (nearest(), ldlq("natural")), Stats(H=H))
    measured = float(fed.loss / fed.first_loss)
    assert measured < 1.0 and abs(np.log(measured / promised)) < np.log(1.35)
