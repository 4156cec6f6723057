"""Entropy-coded integers against the theory: their entropy, the rate at high resolution, the distance from D(R)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, problem, second_moment, with_eigenvalue

import qjax
from qjax.errors import UserError
from qjax.formats.spaced import SPACED
from qjax.rounding import nearest, round_weight
from qjax.rounding.entropy import SIDE, coded, entropy
from qjax.rounding.watersic import watersic
from qjax.stats import Stats

ROWS, N = 4096, 24
SMALL = 1e-4  # of damping: the theory has none
SHAPING = 0.5 * np.log2(2 * np.pi * np.e / 12)


@pytest.fixture(scope="module")
def normal():
    return jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, N)), jnp.float32)


@pytest.fixture(scope="module")
def H():
    return jnp.asarray(second_moment(N, 3))


def test_the_entropy_of_integers_that_are_known():
    z = np.array([[0, 1, -3], [0, 1, 7], [0, 2, 9], [0, 2, -300]])
    np.testing.assert_allclose(entropy(jnp.asarray(z, jnp.int16)), [0, 1, 2], atol=1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 20.0])
def test_what_a_coder_takes_is_the_entropy_of_what_it_was_told(sigma):
    """Of rounded normal numbers, in float64; far out it stays a number."""
    z = np.round(np.random.default_rng(1).standard_normal((20_000, 1)) * sigma).astype(np.int16)
    found, least = (float(f(jnp.asarray(z))[0]) for f in (coded, entropy))
    assert least - 1e-3 <= found - SIDE / len(z) <= least + 0.02
    nothing = jnp.zeros((4, 1), jnp.int16)  # costs what is told of the column
    assert (float(coded(nothing)[0]), float(entropy(nothing)[0])) == (pytest.approx(32 / 4, abs=1e-4), 0)
    z[0] = 3000
    assert np.isfinite(float(coded(jnp.asarray(z))[0]))


def distortion(w, made, H):
    e = np.asarray(w, np.float64) - np.asarray(made.w_hat, np.float64)
    return np.trace(e @ damped64(H, SMALL) @ e.T) / len(e)


def test_at_high_resolution_it_is_a_quarter_of_a_bit_from_the_bound(normal, H):
    """Rate of a column h(w_j) - log2 s_j; distortion n c^2 / 12; 0.2546 bits above log2(n det(H)^(1/n) / D) / 2."""
    made = watersic(normal, H, 5.0, damping=SMALL)
    s = np.asarray(made.scales["s"][0], np.float64)
    L = np.diag(np.linalg.cholesky(damped64(H, SMALL)[::-1, ::-1]))[::-1]
    c = s * L
    np.testing.assert_allclose(c, c.mean(), rtol=1e-3)
    by_column = 0.5 * np.log2(2 * np.pi * np.e) - np.log2(s)
    np.testing.assert_allclose(np.asarray(made.column_rate) - SIDE / ROWS, by_column, atol=0.05)
    lost = distortion(normal, made, H)
    assert lost == pytest.approx(N * c.mean() ** 2 / 12, rel=0.02)
    bound = 0.5 * np.log2(N * np.exp(np.linalg.slogdet(damped64(H, SMALL))[1] / N) / lost)
    assert float(made.rate) - SIDE / ROWS - bound == pytest.approx(SHAPING, abs=0.02)
    assert float(made.rate) == pytest.approx(5.0, abs=0.01) and float(made.damping) == pytest.approx(SMALL)


def test_equal_spacings_lose_more_at_the_rate(normal, H):
    water, equal = (watersic(normal, H, 3.0, spacing, SMALL) for spacing in ("water", "equal"))
    assert abs(float(water.rate) - float(equal.rate)) < 0.01
    assert distortion(normal, water, H) < 0.9 * distortion(normal, equal, H)
    np.testing.assert_array_equal(equal.scales["s"], equal.scales["s"][0, 0])


def test_jitted_it_is_the_same_and_compiled_once(normal, H):
    count = []

    @jax.jit
    def run(w, H):
        count.append(1)
        return watersic(w, H, 2.0)

    made, again = run(normal, H), watersic(normal, H, 2.0)
    run(2 * normal, H)
    assert len(count) == 1
    assert np.mean(np.asarray(made.codes) == np.asarray(again.codes)) > 0.99
    assert float(made.entropy) < float(made.rate) == pytest.approx(2.0, abs=0.01)


def test_the_format_is_one_as_any_other_but_for_its_name():
    """Any chain runs on it, it packs and unpacks; no name leads to it."""
    w, H = problem(16, 64)
    made = round_weight(w, SPACED, (nearest(), *qjax.recipe("gptq").roundings[1:]), Stats(H=H))
    again = SPACED.unpack(SPACED.pack(made.scales, made.codes))
    for a, b in zip(jax.tree.leaves((made.scales, made.codes)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(made.loss) < float(made.first_loss) and "spaced" not in qjax.format_names()
    with pytest.raises(UserError, match="unknown format"):
        qjax.format("spaced")


def test_what_no_spacing_gives_is_named(normal, H):
    with pytest.raises(UserError, match="bits above 0 and at most 12; got 'water', 0"):
        watersic(normal, H, 0.0)
    bad = watersic(normal[:64], jnp.asarray(with_eigenvalue(N, -3.0)), 3.0)
    assert np.isnan(float(bad.damping))
