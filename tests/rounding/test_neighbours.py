"""Stored scales moved to their neighbours: against float64, on every format that has some, and what it gains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, losses, marked, problem, staged
from rounding_toys import Few

import qjax
from qjax.errors import UserError
from qjax.rounding import check_grid, ldlq, nearest, neighbours, refit, spqr
from qjax.rounding.protocol import DAMPING, State, rounded_of
from qjax.stats import Stats

NONE = {"F32", "F16", "BF16", "NF4_dq", "FP4_dq", "FP8_E4M3_tensor", "FP8_E5M2_tensor"}  # of no block's own
NONE |= {name for name in qjax.format_names() if name.startswith(("E8P", "trellis", "lut", "aqlm"))}
NESTED = ("uint4_g32_u6x16", "uint3_g16_bilevel3x16", "int4_g32_u4xrow")
HAVE = [name for name in (*qjax.format_names(), *NESTED) if name not in NONE]
LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float64)


def test_what_has_none_says_so():
    for name in NONE & set(qjax.format_names()):
        with pytest.raises(UserError, match=f"w: neighbours: no block of {name} has a scale of its own"):
            check_grid((nearest(), neighbours()), qjax.format(name), "w")
    with pytest.raises(UserError, match="no block of few"):
        check_grid((nearest(), neighbours()), Few())
    with pytest.raises(UserError, match="rounds must be at least 1, got 0"):
        neighbours(0)
    check_grid((nearest(), neighbours()), qjax.format("Q8_0"))


@pytest.mark.parametrize("name", marked(HAVE, ("MXFP4", "uint4_g32_u6x16")))
def test_never_a_larger_loss_and_as_it_is_stored(name):
    (w, H), fmt = problem(16, 512), qjax.format(name)
    _, before, after = staged(w, H, fmt, nearest("h"), ldlq(), neighbours(2))
    metric = damped64(H, DAMPING)
    old, new = (losses(w, fmt.decode(s.scales, s.codes), metric) for s in (before, after))
    assert (new <= old * (1 + 1e-5)).all() and new.sum() < old.sum()
    again = fmt.unpack(fmt.pack(after.scales, after.codes))
    for a, b in zip(jax.tree.leaves((after.scales, after.codes)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    tried = [fmt.columns(after.scales, w.shape), *fmt.neighbours(after.scales, w.shape)]
    at = np.random.default_rng(0).integers(len(tried), size=tried[0][0].shape)
    mixed = jax.tree.map(lambda *c: jnp.asarray(np.choose(at, [np.asarray(x) for x in c])), *tried)
    for a, b in zip(jax.tree.leaves(fmt.columns(fmt.store(after.scales, mixed), w.shape)), mixed, strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_four_over_six():
    """Weights on the grid of a scale that puts their peak at 4: the fit takes 6, whose grid is not theirs."""
    rng, fmt = np.random.default_rng(0), qjax.format("NVFP4")
    T = rng.choice([1.0, 2, 3, 4, 8], (8, 64)) * rng.choice([-1, 1], (8, 64))
    T[:, ::16] = 8
    w = jnp.asarray(T * 2.0 ** rng.integers(-6, -2, (8, 1)), jnp.float32)
    H = jnp.diag(jnp.asarray(rng.uniform(0.5, 2, 64), jnp.float32))
    first, after = staged(w, H, fmt, nearest(), neighbours())
    assert float(jnp.max(jnp.abs(w - fmt.decode(first.scales, first.codes)))) > 0.01
    np.testing.assert_array_equal(fmt.decode(after.scales, after.codes), w)


def reference(w, q, d, H):
    """One pass over the blocks of MXFP4, float64: each at the best of half, all or twice its scale, codes descended."""
    e = w - q
    for j in range(0, len(w), 32):
        found = []
        for step in (1.0, 0.5, 2.0):
            now, s = e.copy(), step * d[j // 32]
            for k in range(j + 31, j - 1, -1):
                t = w[k] + (now @ H[:, k] - now[k] * H[k, k]) / H[k, k]
                now[k] = w[k] - np.sign(t) * s * LEVELS[np.abs(np.abs(t) / s - LEVELS).argmin()]
            found.append((now @ H @ now, step, now))
        loss, step, now = min(found, key=lambda f: f[0])
        if loss < e @ H @ e:
            e, d[j // 32] = now, step * d[j // 32]
    return e, d


def test_each_block_takes_the_best_of_its_neighbours():
    (w, H), fmt = problem(8, 128, 3), qjax.format("MXFP4")
    start, after = staged(w, H, fmt, nearest(), neighbours())
    metric, moved = damped64(H, DAMPING), 0
    for row, q, d, q_new, d_new in zip(
        *(np.asarray(a, np.float64) for a in (w, fmt.decode(start.scales, start.codes), start.scales["d"])),
        *(np.asarray(a, np.float64) for a in (fmt.decode(after.scales, after.codes), after.scales["d"])), strict=True,
    ):  # fmt: skip
        moved += (d_new != d).sum()
        e, scales = reference(row, q, d.copy(), metric)
        np.testing.assert_array_equal(d_new, scales)
        np.testing.assert_allclose(q_new, row - e, atol=1e-6)
    assert moved


@pytest.mark.parametrize(
    ("name", "share"),
    marked([("Q2_K", 0.998), ("Q3_K", 0.9995), ("NVFP4", 0.9995), ("MXFP4", 1.0)], [("Q2_K", 0.998)]),
)
def test_behind_refit_it_finds_what_refit_does_not(name, share):
    (w, H), fmt = problem(32, 256), qjax.format(name)
    _, _, before, after = staged(w, H, fmt, nearest("h"), ldlq(), refit(3, 2), neighbours())
    metric = damped64(H, DAMPING)
    old, new = (losses(w, fmt.decode(s.scales, s.codes), metric).sum() for s in (before, after))
    assert new < share * old


def test_outliers_stay_outliers():
    (w, H), fmt = problem(8, 128), qjax.format("uint3_g16_bilevel3x16")
    w = w.at[:, 5].mul(8.0)
    H, fmt = problem(8, 256)[1], fmt
    w = jnp.pad(w, ((0, 0), (0, 128)), constant_values=0.5)
    start, after = staged(w, H, fmt, spqr(0.2), neighbours())
    mask = np.asarray(start.outliers[0])
    assert mask.any()
    np.testing.assert_array_equal(mask, after.outliers[0])
    metric = damped64(H, float(start.damping))
    old, new = (losses(w, rounded_of(s, fmt), metric).sum() for s in (start, after))
    assert new < old


def test_a_stack_is_its_members_in_one_program():
    fmt, pairs = qjax.format("MXFP4"), [problem(8, 64, seed) for seed in range(2)]
    count = []

    def one(w, H):
        count.append(1)
        state = nearest()(State(None, None, w, jnp.float32(DAMPING)), fmt, Stats())
        return neighbours(2)(state, fmt, Stats(H=H)).codes

    over = jax.jit(jax.vmap(one))
    w, H = (jnp.stack(a) for a in zip(*pairs, strict=True))
    codes = over(w, H)
    over(2 * w, H)
    assert len(count) == 1
    for i, (w, H) in enumerate(pairs):
        np.testing.assert_array_equal(codes[i], one(w, H))
