"""Clipping by search: never worse in its own metric, the search by hand, the brute-force bound, chains and errors."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from rounding_problems import damped64, losses, problem, second_moment, staged
from rounding_toys import Few

import qjax
from qjax.errors import UserError
from qjax.rounding import Rounding, check_chain, ldlq, nearest, round_weight
from qjax.rounding.clip import clip
from qjax.rounding.protocol import DAMPING
from qjax.stats import Stats

ROWS, N = 8, 512
KINDS = ("uint4_g32", "uint2_g64", "Q4_0", "Q4_K", "NF4", "NVFP4", "NF4_dq", "FP8_E4M3_tensor")


def blocks(H, groups) -> np.ndarray:
    """The diagonal blocks of H, f64[G, size, size]."""
    size = H.shape[0] // groups
    return np.stack([np.float64(H)[i : i + size, i : i + size] for i in range(0, H.shape[0], size)])


def errors(w, w_hat, metric, H, groups) -> np.ndarray:
    """e_g M_gg e_g^T, f64[rows, G]."""
    e = (np.float64(w) - np.float64(w_hat)).reshape(w.shape[0], groups, -1)
    if metric == "H":
        return np.einsum("rgi,gij,rgj->rg", e, blocks(damped64(H, DAMPING), groups), e)
    h = np.diag(np.float64(H)) if metric == "h" else np.ones(H.shape[0])
    return (e * e * h.reshape(1, groups, -1)).sum(axis=-1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("metric", ["H", "h", "none"])
@pytest.mark.parametrize("name", KINDS)
def test_never_worse_in_its_metric_and_storable(name, metric):
    w, H = problem(ROWS, N)
    fmt = qjax.format(name)
    before, after = staged(w, H, fmt, nearest(), clip(metric=metric))
    groups = fmt.columns(before.scales, w.shape)[0].shape[1]
    first, last = (errors(w, fmt.decode(s.scales, s.codes), metric, H, groups) for s in (before, after))
    if fmt.rows != 1:
        first, last = first.sum(), last.sum()
    assert (last <= first * (1 + 1e-5) + 1e-12).all()
    again_scales, again = fmt.unpack(fmt.pack(after.scales, after.codes))
    np.testing.assert_array_equal(again, after.codes)
    for key, value in after.scales.items():
        np.testing.assert_array_equal(again_scales[key], value)
    if name == "uint2_g64":
        assert last.sum() < 0.8 * first.sum()


@pytest.mark.parametrize("name", ["uint3_g64_f32", "int3_g64_f32"])
def test_it_is_the_search_by_hand(name):
    """AWQ's: clamp the group to c max|w|, min-max grid of that, least output error; in float64."""
    w, H = problem(ROWS, 128)
    fmt = qjax.format(name)
    start, made = staged(w, H, fmt, nearest("none"), clip(10, 0.5))
    x, affine = np.float64(w).reshape(ROWS, 2, 64), name.startswith("u")
    best, worst = np.full((2, ROWS, 2), np.inf)
    s0 = np.float64(start.scales["scale"])
    for i in range(5):
        c = 1 - i / 10
        tied = []
        if affine:
            low = -s0 * np.float64(start.scales["zero"])
            high = low + 7 * s0
            most = c * np.maximum(np.abs(low), np.abs(high))
            low, high = np.clip(low, -most, most), np.clip(high, -most, most)
            s = (high - low) / 7
            for nudge in (-1e-5, 1e-5):  # with both ends clipped the zero lies halfway between two integers
                z = np.round(-low / s + nudge)[..., None]
                tied.append(s[..., None] * (np.clip(np.round(x / s[..., None]) + z, 0, 7) - z))
        else:
            s = c * s0
            tied.append(s[..., None] * np.clip(np.round(x / s[..., None]), -4, 3))
        found = [errors(w, w_hat.reshape(w.shape), "H", H, 2) for w_hat in tied]
        best, worst = np.minimum(best, np.min(found, axis=0)), np.minimum(worst, np.max(found, axis=0))
    found = errors(w, fmt.decode(made.scales, made.codes), "H", H, 2)
    assert (found >= best * (1 - 2e-3)).all() and (found <= worst * (1 + 2e-3)).all()
    assert found.sum() < errors(w, fmt.decode(start.scales, start.codes), "H", H, 2).sum()


def test_no_better_than_all_codes_at_its_scales():
    fmt, n = Few((-1.5, -0.5, 0.5, 1.5)), 8
    w = jnp.asarray(np.random.default_rng(0).standard_normal((4, n)), jnp.float32)
    H = jnp.asarray(second_moment(n, tokens=64))
    before, after = staged(w, H, fmt, nearest(), clip())
    points = np.array(list(itertools.product(fmt.levels, repeat=n)))
    for row in range(4):
        q = float(after.scales["s"][row, 0]) * points
        least = losses(np.broadcast_to(np.float64(w[row]), q.shape), q, damped64(H, DAMPING)).min()
        got, first = (losses(w, fmt.decode(s.scales, s.codes), damped64(H, DAMPING))[row] for s in (after, before))
        assert least * (1 - 1e-5) <= got <= first * (1 + 1e-5)


def test_groups_that_gain_nothing_keep_codes_and_scales():
    """Codes of feedback, too: only what is better replaces them."""
    w, H = problem(ROWS, N)
    fmt = qjax.format("uint4_g64")
    before, after = staged(w, H, fmt, nearest("h"), ldlq(), clip(metric="H"))[1:]
    first, last = (errors(w, fmt.decode(s.scales, s.codes), "H", H, 8) for s in (before, after))
    assert (last <= first * (1 + 1e-5)).all()
    kept = np.asarray(after.scales["scale"] == before.scales["scale"])
    same = (np.asarray(after.codes) == np.asarray(before.codes)).reshape(ROWS, 8, -1).all(axis=-1)
    assert (same | (last < first)).all() and kept.shape == same.shape


@pytest.mark.slow
def test_clipping_helps_feedback():
    w, H = problem(ROWS, N)
    fmt, stats = qjax.format("uint2_g64"), Stats(H=H)
    check_chain((nearest(), clip(), ldlq()), fmt, stats)
    plain, clipped = (round_weight(w, fmt, c, stats).loss for c in ((nearest(), ldlq()), (nearest(), clip(), ldlq())))
    assert float(clipped) < 0.9 * float(plain)


def test_requirements_and_errors():
    assert isinstance(clip(), Rounding) and hash(clip()) == hash(clip(20, 0.5))
    assert clip().requires == {"H"} and clip(metric="h").requires == {"h"} and not clip(metric="none").requires
    fmt = qjax.format("uint4_g32")
    with pytest.raises(UserError, match="first rounding must fit"):
        check_chain((clip(),), fmt, Stats(H=jnp.eye(N)))
    with pytest.raises(UserError, match="'H'"):
        check_chain((nearest(), clip()), fmt, Stats(h=jnp.ones(N)))
    for bad, word in (({"grid": 0}, "grid"), ({"shrink": 0.0}, "shrink"), ({"metric": "G"}, "metric")):
        with pytest.raises((UserError, jaxtyping.TypeCheckError), match=word):
            clip(**bad)


@pytest.mark.slow
def test_a_stack_is_its_members_and_nothing_compiles_twice():
    pairs = [problem(ROWS, N, seed) for seed in range(3)]
    ws, Hs = jnp.stack([w for w, _ in pairs]), jnp.stack([H for _, H in pairs])
    fmt = qjax.format("uint3_g64")

    def one(w, H):
        r = round_weight(w, fmt, (nearest(), clip()), Stats(H=H))
        return r.loss, r.codes

    loss, codes = (np.stack(a) for a in zip(*(one(w, H) for w, H in pairs), strict=True))
    before = round_weight._cache_size()
    one(2 * ws[0], Hs[1])
    assert round_weight._cache_size() == before
    scanned = jax.jit(lambda w, H: lax.scan(lambda c, x: (c, one(*x)), 0, (w, H))[1])
    for way in (jax.jit(jax.vmap(one)), scanned):
        got_loss, got = way(ws, Hs)
        assert (np.asarray(got) != codes).mean() < 1e-2  # two candidates may tie
        np.testing.assert_allclose(got_loss, loss, rtol=1e-2)
