"""HQQ against the published update in float64, its own objective, and the formats that have an offset."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rounding_problems import problem

import qjax
from qjax.errors import UserError
from qjax.rounding import Rounding, check_chain, ldlq, nearest, round_weight
from qjax.rounding.hqq import hqq, proximal
from qjax.rounding.protocol import DAMPING, State
from qjax.rounding.ranges import level
from qjax.stats import Stats

ROWS, N = 8, 512
OFFSETS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "uint4_g32", "uint2_g64", "uint2_g64_mse", "uint4_g64_zf16",
           "uint2_g16_mse_u4x16")  # fmt: skip


def weights(seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_t(4, (ROWS, N)), jnp.float32)


def fitted(w, name, stage):
    made = stage(State(None, None, w, jnp.float32(DAMPING)), qjax.format(name), Stats())
    return made.scales, made.codes


def norms(w, w_hat, groups, p) -> np.ndarray:
    """sum |w - w_hat|^p of each group."""
    e = np.abs(np.float64(w) - np.float64(w_hat)).reshape(ROWS, groups, -1)
    return (e**p).sum(axis=-1)


def published(w, scale, zero, top, p, beta, kappa, iterations):
    """The update as mobiusml/hqq has it, on z and 1 / s, in float64: z after each turn, [iterations, rows, G, 1]."""
    inverse, found = 1 / scale, []
    for _ in range(iterations):
        q = np.clip(np.round(w * inverse + zero), 0, top)
        off = w - (q - zero) / inverse
        e = np.sign(off) * np.maximum(np.abs(off) - np.abs(off) ** (p - 1) / beta, 0)
        zero = np.mean(q - (w - e) * inverse, axis=-1, keepdims=True)
        beta *= kappa
        found.append(zero)
    return np.stack(found)


@pytest.mark.parametrize("p, beta", [(0.7, 10.0), (0.7, 100.0), (0.5, 30.0), (1.0, 20.0)])
def test_the_offsets_are_the_published_update(p, beta):
    """Turn by turn, up to ties: a code that tips moves its group's zero by 1 / 64."""
    w, fmt, turns = weights(), qjax.format("uint4_g64_zf16"), 20
    s, m = fmt.columns(fmt.fit(w), w.shape)
    x = w.reshape(*s.shape, -1)
    scale = np.float64(s)[..., None]
    expected = published(np.float64(x), scale, -np.float64(m)[..., None] / scale, 15, p, beta, 1.01, turns)
    step = jax.jit(lambda m, beta: proximal(x, s, m, partial(level, fmt), p, beta))
    for i in range(turns):
        m = step(m, jnp.float32(beta * 1.01**i))
        off = np.abs(-np.float64(m) / scale[..., 0] - expected[i, ..., 0])
        assert (off < 1e-4).mean() > 0.95 and off.max() < 0.1


def test_zeros_and_codes_are_the_best_of_the_published_path():
    w, fmt = weights(), qjax.format("uint4_g64_zf16")
    start = fmt.fit(w)
    scale, first = np.float64(start["scale"])[..., None], np.float64(start["zero"])[..., None]
    x = np.float64(w).reshape(*start["scale"].shape, -1)
    path = np.concatenate([first[None], published(x, scale, first, 15, 0.7, 10.0, 1.01, 20)])
    path = np.float64(np.float16(path))  # as stored
    codes = np.clip(np.round(x / scale + path), 0, 15)
    error = (np.abs(x - scale * (codes - path)) ** 0.7).sum(axis=-1)
    best = error.argmin(axis=0)[None, ..., None]
    scales, made = fitted(w, "uint4_g64_zf16", hqq())
    np.testing.assert_array_equal(scales["scale"], start["scale"])
    same = np.float64(scales["zero"]) == np.take_along_axis(path, best, 0)[0, ..., 0]
    assert same.mean() > 0.9
    expected = np.take_along_axis(codes, best, 0)[0]
    assert (np.float64(made).reshape(x.shape)[same] == expected[same]).mean() > 0.999
    w_hat = fmt.decode(scales, made)
    np.testing.assert_allclose(norms(w, w_hat, 8, 0.7), error.min(axis=0), rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.02])
@pytest.mark.parametrize("name", OFFSETS)
def test_no_group_is_worse_in_the_norm_and_all_is_storable(name, scale):
    w, fmt = weights(3, scale), qjax.format(name)
    start = fmt.fit(w)
    s, m = fmt.columns(start, w.shape)
    for key, value in fmt.store(start, (s, m)).items():  # what a group that finds nothing better relies on
        np.testing.assert_array_equal(value, start[key])
    scales, codes = fitted(w, name, hqq(beta=10.0 / scale))
    for key, value in fmt.unpack(fmt.pack(scales, codes))[0].items():
        np.testing.assert_array_equal(scales[key], value)
    before = norms(w, fmt.decode(start, fmt.nearest(start, w)), s.shape[1], 0.7)
    after = norms(w, fmt.decode(scales, codes), s.shape[1], 0.7)
    assert (after <= before * (1 + 1e-5)).all()
    if name in ("uint4_g64_zf16", "Q4_1", "Q5_1"):  # zeros fine enough to keep the gain
        assert after.sum() < 0.985 * before.sum()


def test_more_turns_are_never_worse():
    w, fmt = weights(4), qjax.format("uint4_g64_zf16")
    found = [norms(w, fmt.decode(*fitted(w, fmt.name, hqq(k))), 8, 0.7) for k in (1, 3, 20)]
    assert (found[1] <= found[0] * (1 + 1e-6)).all() and (found[2] <= found[1] * (1 + 1e-6)).all()


def test_small_errors_are_shrunk_to_nothing_and_the_offset_is_the_mean():
    w = weights(5, 0.02)
    fmt = qjax.format("uint4_g64_zf16")
    s, m = fmt.columns(fmt.fit(w), w.shape)
    x = w.reshape(*s.shape, -1)
    t = level(fmt, (x - m[..., None]) / s[..., None])
    mean = jnp.mean(x - s[..., None] * t, axis=-1)
    np.testing.assert_allclose(proximal(x, s, m, partial(level, fmt), 0.7, 10.0), mean, atol=1e-6)


def test_it_fits_first_and_feedback_follows():
    w, H = problem(ROWS, N)
    fmt, stats = qjax.format("uint3_g64_zf16"), Stats(H=H)
    check_chain((hqq(), ldlq()), fmt, stats)
    r = round_weight(w, fmt, (hqq(), ldlq()), stats)
    assert float(r.loss) < 0.6 * float(r.first_loss)
    assert hqq().fits and not hqq().requires and isinstance(hqq(), Rounding)
    assert hash(hqq()) == hash(dataclasses.replace(hqq()))


@pytest.mark.parametrize("name", ["Q4_0", "NF4", "int4_g32", "F16", "FP8_E4M3_tensor"])
def test_formats_without_an_offset_are_refused(name):
    w = weights()
    with pytest.raises(UserError, match=rf"{name} has no offset.*uint4_g64"):
        check_chain((hqq(),), qjax.format(name), Stats())
    with pytest.raises(UserError, match=name):
        round_weight(w, qjax.format(name), (hqq(),), Stats())


@pytest.mark.parametrize("bad", [{"iterations": 0}, {"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": -1.0}])
def test_bad_parameters_are_told(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        hqq(**bad)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("w", [np.zeros((ROWS, N)), np.full((ROWS, N), 3.0), 1e-30 * np.eye(ROWS, N)], ids=range(3))
@pytest.mark.parametrize("name", ["uint4_g64_zf16", "Q4_1", "Q4_K"])
def test_degenerate_groups_stay_finite(name, w):
    w = jnp.asarray(w, jnp.float32)
    w_hat = qjax.format(name).decode(*fitted(w, name, hqq()))
    assert np.isfinite(w_hat).all() and np.abs(w_hat - w).max() <= 1e-2 * np.abs(w).max() + 1e-6


@pytest.mark.slow
def test_a_stack_is_its_members_and_nothing_compiles_twice():
    stack, fmt = jnp.stack([weights(seed) for seed in range(3)]), qjax.format("uint4_g64_zf16")

    def one(w):
        r = round_weight(w, fmt, (hqq(),), Stats())
        return r.scales["zero"], r.codes

    alone = [np.stack(a) for a in zip(*(one(w) for w in stack), strict=True)]
    before = round_weight._cache_size()
    one(2 * stack[0])
    assert round_weight._cache_size() == before
    scanned = jax.jit(lambda ws: lax.scan(lambda c, w: (c, one(w)), 0, ws)[1])
    for way in (jax.jit(jax.vmap(one)), scanned, jax.jit(lambda ws: lax.map(one, ws))):
        zero, codes = way(stack)
        assert (np.abs(zero - alone[0]) < 1e-6).mean() > 0.98  # a tie may choose another turn
        assert (np.asarray(codes) != alone[1]).mean() < 5e-3


def test_nearest_is_where_it_starts():
    """One turn that finds nothing better leaves the fit."""
    w = weights(7)
    scales, codes = fitted(w, "uint4_g32", hqq(1, p=1.0, beta=1e9))
    near = nearest()(State(None, None, w, jnp.float32(DAMPING)), qjax.format("uint4_g32"), Stats())
    np.testing.assert_array_equal(scales["scale"], near.scales["scale"])
    assert codes.shape == near.codes.shape and codes.dtype == near.codes.dtype
