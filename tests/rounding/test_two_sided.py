"""Rows that make up for each other: the decomposition and the closed forms against float64, and what they gain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import means, sums
from qjax.errors import UserError
from qjax.pipeline.rounded import round_leaf
from qjax.reparam import Site, behind_outputs, reparametrize, restore
from qjax.rounding import round_weight
from qjax.rounding.curvature import two_sided_loss
from qjax.rounding.protocol import DAMPING
from qjax.rounding.shrinkage import output_error
from qjax.rounding.two_sided import in_turns, round_two_sided, row_leftover, turn_size, turns_for, turns_of
from qjax.stats import Stats

N, K, M = 64, 2, 24
ROWS = K * M
FORMAT = qjax.format("int3_g32")
GPTQ = qjax.recipe("gptq").roundings


def vectors(n, count, seed):
    """With a few strong directions, the same for all seeds."""
    mix = np.random.default_rng(1).normal(size=(n, n)) * np.geomspace(3, 0.1, n)
    return np.random.default_rng(seed).normal(size=(count, n)) @ mix.T


def gram(n, count, seed):
    x = vectors(n, count, seed)
    return jnp.asarray(x.T @ x / count, jnp.float32)


def grams(count, seed):
    return jnp.stack([gram(M, count, seed + i) for i in range(K)])


@pytest.fixture(scope="module")
def w():
    return jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, N)), jnp.float32)


@pytest.fixture(scope="module")
def H():
    return gram(N, 400, 5)


def dense(made):
    return FORMAT.decode(made.scales, made.codes)


def loss(w, made, H, G):
    return float(two_sided_loss(w - dense(made), H, G))


def test_where_g_is_the_identity_it_is_the_chain_itself(w, H):
    """YAQA with H_O = 1 is LDLQ; so it is with one turn."""
    alone = round_weight(w, FORMAT, GPTQ, Stats(H=H))
    one = jnp.broadcast_to(jnp.eye(M), (K, M, M))
    for G, turns in ((one, 8), (grams(300, 7), 1)):
        made = round_two_sided(w, FORMAT, GPTQ, Stats(H=H, G=G), turns)
        np.testing.assert_array_equal(made.codes, alone.codes)
        np.testing.assert_array_equal(dense(made), dense(alone))


def test_turns_are_problems_of_their_own(w, H):
    """tr(G E H E^T) = sum_b tr(D_b S_b H S_b^T), S_b = T_b - W_hat_b, whatever the rounding; float64, per block."""
    G, size = grams(300, 7), 6
    turns, targets = turns_of(G, 0.2, size), []

    def coarse(rows):
        targets.append(np.asarray(rows, np.float64).reshape(K, size, N))
        return round_weight(rows, FORMAT, GPTQ, Stats(H=H))

    made = in_turns(w, turns, FORMAT, coarse)
    E = (np.asarray(w, np.float64) - np.asarray(dense(made), np.float64)).reshape(K, M, N)
    H64, total = np.asarray(H, np.float64), 0.0
    for k in range(K):
        order = np.asarray(turns.order[k])
        G64 = np.asarray(G[k], np.float64)
        G64 = 0.8 * G64 + (0.2 + DAMPING) * np.diag(np.diag(G64))
        there = E[k][order]
        L = np.eye(M) + np.asarray(turns.coupling[k], np.float64)
        D = np.linalg.solve(L, np.linalg.solve(L, G64[np.ix_(order, order)]).T)
        assert np.abs(D - D * (np.arange(M)[:, None] // size == np.arange(M) // size)).max() < 1e-4 * np.abs(D).max()
        assert (np.diff(np.diag(np.asarray(G[k]))[order]) >= 0).all(), "the rows of the largest G go first"
        for b, target in zip(range(M // size - 1, -1, -1), targets, strict=True):
            at = slice(b * size, (b + 1) * size)
            S = target[k] - (np.asarray(w).reshape(K, M, N)[k][order] - there)[at]
            total += np.trace(D[at, at] @ S @ H64 @ S.T)
    blocks = (0.8 * np.asarray(G) + (0.2 + DAMPING) * np.asarray(G) * np.eye(M)).astype(np.float64)
    assert total == pytest.approx(np.einsum("kij,kin,nm,kjm->", blocks, E, H64, E, optimize=True), rel=1e-4)


def test_rows_that_make_up_for_each_other_lose_less(w, H):
    stats = Stats(H=H, G=grams(300, 7))
    alone = loss(w, round_weight(w, FORMAT, GPTQ, stats), H, stats.G)
    found = [loss(w, round_two_sided(w, FORMAT, GPTQ, stats, turns), H, stats.G) for turns in (2, 4, 8)]
    assert found[2] < found[1] < found[0] < 0.8 * alone and found[2] < 0.5 * alone


def test_the_closed_form_is_that_of_float64_and_of_white_errors(w):
    G, unseen, size, a = grams(60, 7), grams(40, 70), 6, 0.1
    left = np.asarray(row_leftover(G, unseen, a, size, DAMPING)).reshape(K, M)
    for k in range(K):
        H64 = np.asarray(G[k], np.float64)
        order = np.argsort(np.diag(H64))
        damped = ((1 - a) * H64 + (a + DAMPING) * np.diag(np.diag(H64)))[np.ix_(order, order)]
        c = np.linalg.cholesky(damped)
        blocks = c * (np.arange(M)[:, None] // size == np.arange(M) // size)
        inverse = np.linalg.inv(c @ np.linalg.inv(blocks))
        want = np.diag(inverse @ np.asarray(unseen[k], np.float64)[np.ix_(order, order)] @ inverse.T)
        np.testing.assert_allclose(left[k][order], want, rtol=2e-3)


def test_held_out_tokens_say_how_far_g_is_believed(w):
    """Many tokens: whole. Few: in part. Tokens of another text: not at all."""
    e = 0.1 * w
    (many, gain, size), (few, less, _) = (turns_for(e, grams(n, 7), grams(5000, 90), 8) for n in (20_000, 8))
    assert many <= 0.05 < few and gain < less < 1 and size == 3
    other = jnp.stack([jnp.diag(jnp.diagonal(G)) for G in grams(5000, 90)])
    assert turns_for(e, grams(10, 7), other, 8)[1] >= 1
    assert turns_for(jnp.zeros_like(w), grams(30, 7), other, 8)[1] == 1


@pytest.mark.parametrize(("m", "turns", "size"), [(64, 8, 8), (576, 8, 72), (36, 8, 6), (7, 8, 1), (13, 8, 13)])
def test_turns_are_of_one_size(m, turns, size):
    assert turn_size(m, turns) == size


def test_jitted_and_over_a_stack_it_is_the_same(w, H):
    stats = Stats(H=H, G=grams(300, 7))
    count = []

    @jax.jit
    def over(ws):
        count.append(1)
        return jax.vmap(lambda w: round_two_sided(w, FORMAT, GPTQ, stats).codes)(ws)

    codes = over(jnp.stack([w, w[::-1]]))
    over(jnp.stack([w + 1, w]))
    assert len(count) == 1
    agree = np.mean(np.asarray(codes[0]) == np.asarray(round_two_sided(w, FORMAT, GPTQ, stats).codes))
    assert agree > 0.99  # one program rounds float32 sums in another order


@pytest.mark.parametrize("chain", ["hadamard('out')", "rescale() >> kronecker()", "low_rank(4)"])
def test_behind_a_change_of_the_output_g_is_that_of_what_the_codes_make(w, H, chain):
    """tr(G E H E^T) before the chain is tr(G' E' H' E'^T) behind it."""
    G = grams(300, 7)
    site, applied, _ = reparametrize(
        qjax.recipe(f"{chain} >> nearest()").reparams, Site(w, Stats(H=H), FORMAT), frozenset("H")
    )
    there = behind_outputs(applied, G, ROWS, N)
    e = 0.1 * jnp.asarray(np.random.default_rng(2).normal(size=w.shape), jnp.float32)
    before = restore(applied, site.w) - restore(applied, site.w - e)
    assert float(two_sided_loss(before, H, G)) == pytest.approx(float(two_sided_loss(e, site.stats.H, there)), rel=1e-3)


def seen(count, seed, G=None):
    x = jnp.asarray(vectors(N, count, seed), jnp.float32)
    drift = jnp.asarray(np.random.default_rng(4).normal(size=(N, N)) / N, jnp.float32)
    stats = means(sums(x, ("H", "cross"), x + x @ drift))
    return Stats(**{k: getattr(stats, k) for k in ("H", "cross", "count")}, G=G)


def test_the_pipeline_takes_turns_where_held_out_tokens_gain(w):
    """On tokens of the test, in their H and G, against the float model's output."""
    used, held, test = seen(2000, 3, grams(300, 7)), seen(600, 30, grams(100, 70)), seen(20_000, 300, grams(5000, 90))
    found = {}
    for turns in (0, 8):
        made = qjax.recipe(f"gptaq >> options(shrink=True, two_sided={turns})")
        q, line = round_leaf("w", w, -1, FORMAT, made, used, held)
        assert (line.output_shrinkage is not None) == bool(turns) and not line.guarded
        found[turns] = float(output_error(w, qjax.dequantize(q), test))
    corrected = float(output_error(w, w + w @ test.cross @ jnp.linalg.inv(test.H), test))
    assert found[8] - corrected < 0.7 * (found[0] - corrected)
    noise = jnp.stack([jnp.diag(jnp.diagonal(G)) for G in test.G])
    q, line = round_leaf("w", w, -1, FORMAT, made, seen(2000, 3, grams(10, 7)), seen(600, 30, noise))
    alone, _ = round_leaf("w", w, -1, FORMAT, qjax.recipe("gptaq >> options(shrink=True)"), used, held)
    assert line.output_shrinkage is None
    np.testing.assert_array_equal(qjax.dequantize(q), qjax.dequantize(alone))


def test_without_shrinkage_g_is_believed_whole(w):
    stats = seen(2000, 3, grams(300, 7))
    q, line = round_leaf("w", w, -1, FORMAT, qjax.recipe("gptq >> options(two_sided=8)"), stats)
    alone, _ = round_leaf("w", w, -1, FORMAT, qjax.recipe("gptq"), stats)
    found = [float(two_sided_loss(w - qjax.dequantize(v), stats.H, stats.G)) for v in (q, alone)]
    assert found[0] < 0.6 * found[1]
    assert line.loss == pytest.approx(found[0] / float(two_sided_loss(w, stats.H, stats.G)), rel=1e-4)
    assert line.first_loss is None and line.output_shrinkage == 0 and line.shrinkage is None
    held = seen(600, 30, grams(100, 70))
    _, line = round_leaf("w", w, -1, FORMAT, qjax.recipe("gptq >> options(two_sided=8)"), stats, held)
    there = [float(two_sided_loss(v, held.H, held.G)) for v in (w - qjax.dequantize(q), w)]
    assert line.heldout_loss == pytest.approx(there[0] / there[1], rel=1e-4) and line.tokens == 2000


def test_a_stack_has_a_g_each_and_tied_rows_none(w):
    G = jnp.stack([grams(300, 7), grams(300, 17)])
    one = seen(2000, 3)
    stats = Stats(H=one.H, count=one.count, G=G)
    made = qjax.recipe("gptq >> options(two_sided=8)")
    q, _ = round_leaf("w", jnp.stack([w, w]), -1, FORMAT, made, stats)
    for i in range(2):
        alone, _ = round_leaf("w", w, -1, FORMAT, made, Stats(H=one.H, count=one.count, G=G[i]))
        np.testing.assert_array_equal(qjax.dequantize(q)[i], qjax.dequantize(alone))
    tied = qjax.format("FP8_E4M3_tensor")
    found = [round_leaf("w", w, -1, tied, made, Stats(H=one.H, count=one.count, G=g)) for g in (G[0], None)]
    np.testing.assert_array_equal(*(qjax.dequantize(q) for q, _ in found))
    why = ("FP8_E4M3_tensor holds rows together", "G of the weight's output is not known")
    assert [line.note.rpartition("rows stand alone: ")[2] for _, line in found] == [*why]


@pytest.mark.parametrize(
    ("G", "message"),
    [(jnp.ones((1, M, M)), r"w: G has the shape \(1, 24, 24\), and the weight has 48 outputs"),
     (jnp.full((K, M, M), jnp.nan), "w: G of its output has values that are NaN"),
     (jnp.broadcast_to(-jnp.eye(M), (K, M, M)), "w: G = .* is not positive semi-definite")],
)  # fmt: skip
def test_a_bad_g_is_named(w, G, message):
    with pytest.raises(UserError, match=message):
        round_leaf("w", w, -1, FORMAT, qjax.recipe("gptq >> options(two_sided=8)"), seen(500, 3, G))


def test_turns_are_a_number():
    for bad in (-1, True):
        with pytest.raises(UserError, match="two_sided is a number of turns"):
            qjax.recipe(f"gptq >> options(two_sided={bad})")
    assert str(qjax.recipe("gptq >> options(two_sided=4)")).endswith("options(two_sided=4)")
