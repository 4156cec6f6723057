"""Tables that are learned, rounded in the metric of H: what least squares and descent gain on k-means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, problem, staged

import qjax
from qjax.errors import UserError
from qjax.formats.tiles import bound
from qjax.pipeline.rounded import round_leaf
from qjax.rounding import check_grid, codebooks, ldlq, nearest, refit
from qjax.rounding.codebooks import solved
from qjax.rounding.protocol import DAMPING
from qjax.rounding.ranges import ends
from qjax.stats import Stats
from qjax.training.grid.quantizer import Quantizer
from qjax.training.optim.parq import piecewise_affine


def test_lnq_is_far_below_kmeans_and_each_round_is_below_the_last():
    (w, H), fmt = problem(16, 256), qjax.format("lut2")
    states = staged(w, H, fmt, nearest("h"), refit(1, 4), refit(1, 4), refit(1, 4))
    loss = [losses(w, fmt.decode(s.scales, s.codes), damped64(H, DAMPING)) for s in states]
    for a, b in itertools.pairwise(loss):
        assert (b <= a * (1 + 1e-5)).all()
    assert loss[-1].sum() < 0.6 * loss[0].sum() and loss[-1].sum() < 0.99 * loss[1].sum()
    assert qjax.recipes.lnq(2).roundings == (nearest("h"), refit(3, 4)) and qjax.recipes.lnq(2).format == fmt


def test_tables_are_below_even_levels_of_more_bits():
    """2 + 64 / 512 bits in tables against 2 + 18 / 64 of integers, heavy-tailed weights, the same chain."""
    w, H = problem(16, 512)
    w = jnp.asarray(np.random.default_rng(0).standard_t(5, w.shape), jnp.float32)
    table, even = (qjax.format(name) for name in ("lut2", "uint2_g64"))
    loss = {}
    for fmt in (table, even):
        last = staged(w, H, fmt, nearest("h"), ldlq(), refit(2, 2))[-1]
        loss[fmt] = losses(w, fmt.decode(last.scales, last.codes), damped64(H, DAMPING)).sum()
    assert qjax.quantize(w, table).bits_per_weight < qjax.quantize(w, even).bits_per_weight
    assert loss[table] < 0.9 * loss[even]


@pytest.mark.parametrize("share", [0.0, 0.01])
def test_squeezellm_and_its_outliers(share):
    w, H = problem(16, 256)
    w = w.at[3, 5].set(30.0)
    recipe = qjax.recipes.squeezellm(2, share)
    q, _ = round_leaf("w", w, -1, recipe.format, recipe, Stats(H=H))
    extra = 32 * share * w.size + (32 * 17 if share else 0)  # values and columns, and where rows start
    assert q.bits_per_weight == pytest.approx(2 + 64 / 256 + extra / w.size, abs=0.02)
    off = abs(float(qjax.dequantize(q)[3, 5]) - 30.0)
    assert off < 0.02 if share else off < 5.0


def test_training_goes_straight_through_and_what_wants_unit_levels_says_so():
    w, fmt = problem(8, 64)[0], qjax.format("lut2")
    np.testing.assert_array_equal(qjax.fake_quant(w, fmt), qjax.dequantize(qjax.quantize(w, fmt)))
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(qjax.fake_quant(w, fmt)))(w), jnp.ones_like(w))
    with pytest.raises(UserError, match="lut2 has a table of levels and no scale to learn"):
        Quantizer(fmt, scales="learned").init(w)
    with pytest.raises(UserError, match="lut2 fits a table of levels to each row"):
        piecewise_affine(fmt)
    with pytest.raises(UserError, match="lut2 has levels of its own in each row"):
        ends(fmt)


def test_books_are_those_of_least_squares():
    """Conjugate gradients to the end, against the normal equations of float64; and each step is below the last."""
    (w, H), fmt = problem(16, 64), qjax.format("aqlm_2x3_g8")
    metric = jnp.asarray(damped64(H, DAMPING), jnp.float32)
    state = staged(w, H, fmt, nearest())[0]

    @jax.jit
    def run(state):
        return [solved(state, fmt, metric, steps).scales["books"] for steps in (1, 3, 9, 120)]

    eye = jnp.eye(state.scales["books"].size, dtype=jnp.float32)
    A = np.float64(jax.vmap(lambda books: fmt.decode(state.scales | {"books": books[None]}, state.codes))(eye))
    normal = np.einsum("arj,jk,brk->ab", A, np.float64(metric), A)
    right = np.einsum("arj,jk,rk->a", A, np.float64(metric), np.float64(w))
    best = np.linalg.lstsq(normal, right, rcond=1e-10)[0]
    loss = [
        losses(w, np.tensordot(np.float64(b).reshape(-1), A, 1), metric).sum()
        for b in (state.scales["books"], *run(state), best)
    ]
    assert (np.diff(loss[:5]) < 0).all() and loss[4] < 1.002 * loss[5] < 0.9 * loss[0]


def test_aqlm_gains_in_turns_and_is_never_worse():
    (w, H), fmt = problem(32, 256), qjax.format("aqlm_2x4_g8")
    states = staged(w, H, fmt, nearest("h"), ldlq(), codebooks(1), codebooks(2), refit(1))
    loss = [losses(w, fmt.decode(s.scales, s.codes), damped64(H, DAMPING)).sum() for s in states]
    assert loss[1] < 0.9 * loss[0] and loss[2] < 0.88 * loss[1] and loss[3] < 0.99 * loss[2] and loss[4] <= loss[3]
    again = fmt.unpack(fmt.pack(states[-1].scales, states[-1].codes))
    for a, b in zip(jax.tree.leaves((states[-1].scales, states[-1].codes)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="codebooks: Q4_0 has no codebook to solve for"):
        check_grid((nearest(), codebooks()), qjax.format("Q4_0"))
    with pytest.raises(UserError, match="rounds and steps must be at least 1"):
        codebooks(0)


def test_a_tile_is_summed_in_its_own_metric():
    fmt = qjax.format("aqlm_2x3_g8")
    w, H = problem(16, 64)
    scales, _ = fmt.encode(w)
    M, u, s = H[:8, :8], w.reshape(-1, 1, 8), jnp.ones((128, 1), jnp.float32)
    grid = bound(fmt, scales)
    plain, own = (np.float64(grid.round((s, None), u, metric)[0] - u)[:, 0] for metric in (None, M))
    loss = [np.einsum("ti,ij,tj->", e, np.float64(M), e) for e in (plain, own)]
    assert loss[1] < 0.95 * loss[0]
