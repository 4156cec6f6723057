"""Turns of rows with LDLQ in them are YAQA's rounding: against its anti-diagonals in float64, and tiles of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, second_moment
from rounding_toys import Trellis

import qjax
from qjax.errors import UserError
from qjax.rounding import ldlq, nearest, round_two_sided, round_weight
from qjax.rounding.curvature import two_sided_loss
from qjax.rounding.protocol import DAMPING, rounded_of
from qjax.stats import Stats

M, N = 16, 32


def unit_lower(H, tile):
    """L of H + lambda diag(H) = L D L^T, its diagonal tiles 1, float64."""
    c = np.linalg.cholesky(damped64(H, DAMPING))
    blocks = c * (np.arange(len(c))[:, None] // tile == np.arange(len(c)) // tile)
    return c @ np.linalg.inv(blocks)


def yaqa(w, H_O, H_I, level, size):
    """Published order: along anti-diagonals from the far corner, every target from all that is fixed by then.

    Args:
      w: rows and columns as they are rounded, the first last.
      level: (row, column, target) -> its value.
      size: rows of a tile, which do not make up for each other.
    """
    A, B = unit_lower(H_O, size) - np.eye(len(w)), unit_lower(H_I, 1) - np.eye(w.shape[1])
    delta, w_hat = np.zeros_like(w), np.zeros_like(w)
    rows, n = len(w) // size, w.shape[1]
    for s in range(rows + n - 2, -1, -1):
        target = w + A.T @ delta @ B + A.T @ delta + delta @ B
        for i in range(rows):
            if 0 <= s - i < n:
                for r in range(size * i, size * i + size):
                    w_hat[r, s - i] = level(r, s - i, target[r, s - i])
        for i in range(rows):
            if 0 <= s - i < n:
                at = slice(size * i, size * i + size), s - i
                delta[at] = w[at] - w_hat[at]
    return w_hat


@pytest.mark.parametrize(("size", "name"), [(1, "int3_g32"), (4, "NF4_b32")])
def test_its_values_are_those_of_the_published_order(size, name):
    rng = np.random.default_rng(0)
    w, fmt = jnp.asarray(rng.normal(size=(M, N)), jnp.float32), qjax.format(name)
    H_O, H_I = second_moment(M, 1), second_moment(N, 2)
    made = round_two_sided(
        w, fmt, (nearest(), ldlq("natural")), Stats(H=jnp.asarray(H_I), G=jnp.asarray(H_O)[None]), M // size
    )
    order = np.argsort(np.diag(H_O), kind="stable")
    assert (order != np.arange(M)).any()
    s = np.repeat(np.asarray(fmt.columns(made.scales, w.shape)[0], np.float64), N, axis=1)[order][:, ::-1]
    levels = np.arange(-4.0, 4) if name == "int3_g32" else np.asarray(fmt.levels.values, np.float64)
    back = np.ix_(order, np.arange(N)[::-1])

    def level(i, j, t):
        return s[i, j] * levels[np.abs(t / s[i, j] - levels).argmin()]

    want = yaqa(np.asarray(w, np.float64)[back], H_O[np.ix_(order, order)], H_I[::-1, ::-1], level, size)
    np.testing.assert_allclose(np.asarray(fmt.decode(made.scales, made.codes), np.float64)[back], want, atol=1e-5)


def test_tiles_that_span_rows_take_turns_whole():
    rng = np.random.default_rng(1)
    w, fmt = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32), Trellis()
    chain, H = (nearest(), ldlq("natural")), jnp.asarray(second_moment(32, 2))
    mix = rng.normal(size=(64, 64)) * np.geomspace(2, 0.2, 64)
    G = jnp.asarray(mix @ mix.T, jnp.float32)[None]
    alone = round_weight(w, fmt, chain, Stats(H=H))
    one = round_two_sided(w, fmt, chain, Stats(H=H, G=jnp.eye(64)[None]), 64)
    np.testing.assert_array_equal(one.codes, alone.codes)
    np.testing.assert_array_equal(one.scales["s"], alone.scales["s"])
    both = round_two_sided(w, fmt, chain, Stats(H=H, G=G), 64)
    losses = [float(two_sided_loss(w - rounded_of(made, fmt), H, G)) for made in (both, alone)]
    assert losses[0] < 0.9 * losses[1]
    with pytest.raises(UserError, match="trellis holds rows together, and G is of blocks of 8 rows"):
        round_two_sided(w, fmt, chain, Stats(H=H, G=jnp.stack([jnp.eye(8)] * 8)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K", "NVFP4", "int4_g32"])
def test_on_average_it_loses_less_than_feedback_of_columns_alone(name):
    fmt, chain, found = qjax.format(name), (nearest(), ldlq()), []

    @jax.jit
    def lost(w, H, G):
        stats = Stats(H=H, G=G)
        both, alone = round_two_sided(w, fmt, chain, stats, 32), round_weight(w, fmt, chain, stats)
        return [two_sided_loss(w - fmt.decode(r.scales, r.codes), H, G) for r in (both, alone)]

    for seed in range(6):
        w = jnp.asarray(np.random.default_rng(seed).normal(size=(32, 256)), jnp.float32)
        found.append(lost(w, jnp.asarray(second_moment(256, seed)), jnp.asarray(second_moment(32, 50 + seed))[None]))
    ratios = np.array([float(both) / float(alone) for both, alone in found])
    assert ratios.mean() < 0.9 and (ratios < 1.05).all()


def test_a_g_without_a_factor_shows_in_the_damping():
    G = jnp.asarray(np.diag([1.0, 1, 1, -5] * 4), jnp.float32)[None]
    w, H = jnp.ones((M, N)), jnp.asarray(second_moment(N, 2))
    assert np.isnan(float(round_two_sided(w, qjax.format("int3_g32"), (nearest(), ldlq()), Stats(H=H, G=G)).damping))
