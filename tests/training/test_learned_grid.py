"""Learned scales: LSQ's formulas, finite differences of what is smooth, the same on every format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.training.grid.estimators import clipped
from qjax.training.grid.learned_grid import learned_quant, start
from qjax.training.grid.quantizer import SCALES, Quantizer
from qjax.training.grid.scale_rules import ScaleRule

pytestmark = pytest.mark.optimized  # what trains is what is exported, bit for bit

ROWS, N = 4, 256
DENSE = ("F32", "F16", "BF16")
TABLES = ("lut2", "lut3", "lut4")  # levels of each row's own, no scale to learn: tests/rounding/test_learned_tables.py


@pytest.fixture(scope="module")
def w():
    return jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, N)), jnp.float32)


@pytest.fixture(scope="module")
def g():
    return jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, N)), jnp.float32)


def grads(fmt, grid, w, g, how=None):
    fmt = qjax.format(fmt)
    kept = fmt.fit(w)
    return jax.grad(
        lambda grid, w: (learned_quant(fmt, how or clipped("levels"), -1, kept, grid, w) * g).sum(), (0, 1)
    )(grid, w)


def test_lsq_by_its_formula(w, g):
    s = jnp.full((ROWS, N // 32), 0.21, jnp.float32)  # clips some weights
    back, dw = grads("int4_g32", {"s": s}, w, g)
    stored = np.asarray(s.astype(jnp.float16), np.float64)[..., None]
    v, gg = np.asarray(w, np.float64).reshape(ROWS, -1, 32) / stored, np.asarray(g, np.float64).reshape(ROWS, -1, 32)
    slope = np.where(v <= -8, -8, np.where(v >= 7, 7, np.round(v) - v))
    np.testing.assert_allclose(back["s"], (gg * slope).sum(-1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw, (gg * ((v >= -8) & (v <= 7))).reshape(w.shape), rtol=1e-6)
    assert ((v < -8) | (v > 7)).mean() > 0.05


def test_seq_is_the_same_on_half_integer_levels(w, g):
    s = jnp.full((ROWS, N // 64), 0.7, jnp.float32)
    back, _ = grads("int2_g64_mid", {"s": s}, w, g, clipped())
    stored = np.asarray(s.astype(jnp.float16), np.float64)[..., None]
    a = 2 * stored  # ParetoQ's scale: levels +-1/4 and +-3/4 of it
    x, gg = np.asarray(w, np.float64).reshape(ROWS, -1, 64), np.asarray(g, np.float64).reshape(ROWS, -1, 64)
    w_hat = a * (np.round(np.clip(x / a, -0.99, 0.99) * 2 - 0.5) + 0.5) / 2
    by_a = np.where(np.abs(x / a) <= 1, w_hat / a - x / a, np.sign(x) * 0.75)
    np.testing.assert_allclose(back["s"], 2 * (gg * by_a).sum(-1), rtol=1e-4, atol=1e-4)


def test_offsets_move_what_is_clipped(w, g):
    s, m = jnp.full((ROWS, N // 64), 0.2, jnp.float32), jnp.full((ROWS, N // 64), -1.5, jnp.float32)
    back, dw = grads("uint4_g64_zf16", {"s": s, "m": m}, w, g)
    outside = np.asarray(dw) == 0
    assert 0.05 < outside.mean() < 0.5
    np.testing.assert_allclose(back["m"], (np.asarray(g) * outside).reshape(ROWS, -1, 64).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_threshold_of_its_own(w, g):
    """Both scales by finite differences of the soft part: w_hat = s T is linear in s; p acts as -u s / p inside."""
    fmt = qjax.format("TQ2_0")
    s, p = jnp.full((ROWS, 1), 1.25, jnp.float32), jnp.full((ROWS, 1), 1.0, jnp.float32)
    kept = fmt.fit(w)
    y = np.asarray(learned_quant(fmt, clipped(), -1, kept, {"s": s, "p": p}, w))
    np.testing.assert_array_equal(y, np.sign(w) * (np.abs(w) > 0.5) * 1.25)
    back, dw = grads("TQ2_0", {"s": s, "p": p}, w, g, clipped())
    T, gg, x = y / 1.25, np.asarray(g, np.float64), np.asarray(w, np.float64)
    inside = np.abs(x) <= 1.5
    np.testing.assert_allclose(back["s"][:, 0], (gg * T).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(back["p"][:, 0], -(gg * inside * x * 1.25).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(dw, gg * inside * 1.25, rtol=1e-5)


def test_a_threshold_equal_to_the_scale_changes_nothing(w, g):
    s = jnp.full((ROWS, N // 32), 0.21, jnp.float32)
    one, dw = grads("int4_g32", {"s": s}, w, g)
    two, dw2 = grads("int4_g32", {"s": s, "p": s}, w, g)
    np.testing.assert_array_equal(dw, dw2)
    np.testing.assert_allclose(two["s"] + two["p"], one["s"], rtol=1e-3, atol=1e-3)


# Learned scales on every format; the other kinds where scales are stored in another way.
KINDS = [(name, "learned") for name in qjax.format_names() if name not in DENSE + TABLES] + [
    (name, scales)
    for name in ("Q4_0", "Q3_K", "int2_g64_mid_mse", "NF4_dq", "TQ2_0", "uint4_g64_zf16", "NVFP4")
    for scales in SCALES
    if scales != "learned"
]


@pytest.mark.slow
@pytest.mark.parametrize("name, scales", KINDS)
def test_every_format_trains_and_exports_exactly(name, scales):
    w = jnp.asarray(np.random.default_rng(2).standard_normal((N, max(ROWS, qjax.format(name).rows))), jnp.float32)
    q = Quantizer(qjax.format(name), -2, scales)
    trained, kept = q.init(w)
    trained = jax.tree.map(lambda t: t + 0.04, trained)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, N)), jnp.float32)

    def loss(w, trained):
        w_hat = q.fake(w, trained, kept)
        return ((x @ w_hat - 1) ** 2).sum(), w_hat

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, w_hat), (dw, dt) = step(w, trained)
    packed = q.pack(w, trained, kept)
    np.testing.assert_array_equal(qjax.dequantize(packed), w_hat)
    if scales != "learned":
        np.testing.assert_array_equal(q.fake(w, trained, kept), w_hat)
    assert float(jnp.abs(dw).max()) > 0
    one_for_all = name.endswith("_tensor")
    for key, d in dt.items():
        assert np.isfinite(d).all()
        if key == "scale":
            assert float(jnp.abs(d).min(-1).max()) > 0, key
    coarse = ("MXFP4", "IQ1_S", "IQ1_M")  # powers of two and odd numbers up to 15: four percent move none
    if trained and not one_for_all and name not in coarse:  # the scale has moved
        still = q.fake(w, jax.tree.map(jnp.zeros_like, trained), kept)
        assert float(jnp.abs(still - w_hat).max()) > 0
    step(w + 0.01, trained)
    assert step._cache_size() == 1


def test_frozen_scales_are_idempotent(w):
    q = Quantizer(qjax.format("int3_g128_mse"), scales="frozen")
    _, kept = q.init(w)
    once = q.fake(w, {}, kept)
    np.testing.assert_array_equal(q.fake(once, {}, kept), once)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scales", SCALES)
def test_training_goes_on_from_any_recipes_result(scales, w):
    """The start is the QTensor that came in: same codes' grid, same values for weights that lie on it."""
    fmt = qjax.format("uint3_g64")
    q = qjax.quantize(w * 0.9, fmt)  # scales that a fit of w would not find
    quantizer = Quantizer(fmt, -1, scales)
    trained, kept = quantizer.init_from(q)
    if scales == "refit":
        assert (trained, kept) == ({}, {})
        return
    w_hat = qjax.dequantize(q)
    np.testing.assert_array_equal(quantizer.fake(w_hat, trained, kept), w_hat)
    assert float(jnp.abs(quantizer.fake(w, trained, kept) - qjax.dequantize(qjax.quantize(w, fmt))).max()) > 0
    with pytest.raises(UserError, match="does not fit"):
        quantizer.init_from(qjax.quantize(w, "Q4_0"))


def test_learning_the_scale_finds_the_least_squares_scale():
    """Gradient descent on the squared error, from twice too wide a grid, ends at the error of the searched scale."""
    w = jnp.asarray(np.random.default_rng(5).laplace(size=(8, 1024)), jnp.float32)
    q = Quantizer(qjax.format("int2_g128_mid"), scales="learned", rule=ScaleRule("seq"))
    trained, kept = q.init(w)

    @jax.jit
    def descend(trained, _):
        g = jax.grad(lambda t: ((q.fake(w, t, kept) - w) ** 2).sum(-1).mean())(trained)
        return jax.tree.map(lambda t, d: t - 2e-3 * d, trained, g), None

    def error(t):
        return float(((q.fake(w, t, kept) - w) ** 2).sum() / (w**2).sum())

    before = error(trained)
    after = error(jax.lax.scan(descend, trained, length=200)[0])
    best = float(((qjax.dequantize(qjax.quantize(w, "int2_g128_mid_mse")) - w) ** 2).sum() / (w**2).sum())
    assert after < before * 0.6 and after < best * 1.02


def test_start_is_where_the_fit_is(w):
    fmt = qjax.format("Q4_K")
    kept = fmt.fit(w)
    parameters, at = start(fmt, kept, w.shape)
    assert set(parameters) == {"scale", "offset"} and not any(np.any(p) for p in parameters.values())
    np.testing.assert_array_equal(at["s"], fmt.columns(kept, w.shape)[0])
