"""8-bit floats against ml_dtypes, exhaustively: all codes, all neighbours of all ties, eagerly and compiled."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.formats.float8 import FORMATS, float8, parse, rounded

pytestmark = pytest.mark.optimized  # the very codes of ml_dtypes

KINDS = {"E4M3": (ml_dtypes.float8_e4m3fn, 448.0), "E5M2": (ml_dtypes.float8_e5m2, 57344.0)}


def all_values(kind):
    return np.arange(256, dtype=np.uint8).view(KINDS[kind][0]).astype(np.float32)


def hard_cases(kind):
    """Every value, every midpoint, floats next to both, numbers a float16 would round first, far outside, denormals."""
    values = np.unique(all_values(kind)[np.isfinite(all_values(kind))])
    middles = (values[1:] + values[:-1]) / np.float32(2)
    exact = np.concatenate([values, middles])
    steps = [exact]
    for away in (np.float32(np.inf), np.float32(-np.inf)):
        near = exact
        for _ in range(3):
            near = np.nextafter(near, away)
            steps.append(near)
    relative = [exact * np.float32(1 + r) for r in (2.0**-11, -(2.0**-11), 2.0**-12, -(2.0**-12), 2.0**-16)]
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(200_000) * 2.0 ** rng.uniform(-26, 20, 200_000)
    far = [1e9, -1e9, 3e38, 1e-30, -1e-30, 449, 464, 465, 61440, 65535, 65536, -0.0]
    return np.concatenate([*steps, *relative, spread, far]).astype(np.float32)


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_one_step_to_even(kind, compiled):
    dtype, top = KINDS[kind]
    x = hard_cases(kind)
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)]  # XLA flushes denormals, to zeros of either sign
    expected = np.clip(x, -top, top).astype(dtype).view(np.uint8)
    f = jax.jit(rounded, static_argnums=1) if compiled else rounded
    np.testing.assert_array_equal(np.asarray(f(jnp.asarray(x), kind)), expected)


@pytest.mark.parametrize("scope", ("channel", "tensor"))
@pytest.mark.parametrize("kind", KINDS)
def test_all_codes_decode_as_ml_dtypes_has_them(kind, scope):
    fmt = float8(kind, scope)
    codes = jnp.arange(256, dtype=jnp.uint8)[None]
    scales = {"scale": jnp.full((1, 1), 0.37, jnp.float32)}
    expected = all_values(kind)[None] * np.float32(0.37)
    for f in (fmt.decode, jax.jit(fmt.decode)):
        np.testing.assert_array_equal(np.asarray(f(scales, codes)), expected)  # NaN and inf too


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_against_numpy(fmt, rng):
    dtype, top = KINDS[fmt.levels.kind]
    w = (rng.standard_normal((3, 8, 256)) * rng.lognormal(0, 1, (3, 8, 1))).astype(np.float32)
    parts, axes = {
        "channel": (w, -1),
        "tensor": (w, (-2, -1)),
        "block": (w.reshape(3, 8, -1, fmt.block or 256), -1),
    }[fmt.scaling.scope]
    scale = np.abs(parts).max(axes, keepdims=True) / np.float32(top)
    codes = np.clip(parts / scale, -top, top).astype(dtype)
    w_hat = (codes.astype(np.float32) * scale).reshape(w.shape)
    q = qjax.quantize(w, fmt)
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(q)), w_hat)
    np.testing.assert_array_equal(np.asarray(q.leaves["codes"]), codes.view(np.uint8).reshape(w.shape))
    expected = {"channel": (3, 8, 1), "tensor": (3, 1, 1), "block": (3, 8, 2)}[fmt.scaling.scope]
    assert q.leaves["scale"].shape == expected
    assert np.abs(np.asarray(q.leaves["codes"]).view(dtype).astype(np.float32)).max() == top
    # a stack is each matrix; compiled is eager
    mapped = jax.vmap(lambda m: fmt.pack(*fmt.encode(m)))(jnp.asarray(w))
    eager = fmt.pack(*fmt.encode(jnp.asarray(w)))
    for key in eager:
        np.testing.assert_array_equal(mapped[key], eager[key])
        np.testing.assert_array_equal(q.leaves[key], eager[key])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_grid_points_stay_and_powers_of_two_go_through(fmt, rng):
    w = rng.standard_normal((16, 256)).astype(np.float32)
    q = qjax.quantize(w, fmt)
    w_hat = qjax.dequantize(q)
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(w_hat, fmt)), w_hat)
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(w * np.float32(2.0**-20), fmt)), w_hat * 2.0**-20)
    relative = np.abs(np.asarray(w_hat) - w) / np.abs(w)
    normal = np.abs(w) > np.abs(w).max() * 1e-3
    assert relative[normal].max() <= {"E4M3": 2.0**-4, "E5M2": 2.0**-3}[fmt.levels.kind] * (1 + 1e-5)
    if fmt.block:
        assert q.bits_per_weight == fmt.bits_per_weight == 8.25
    else:
        assert fmt.bits_per_weight == 8


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_degenerate_rows(fmt):
    w = np.zeros((5, 128), np.float32)
    w[1], w[2, 3], w[3], w[4] = 0.37, 1e30, 1e-42, -3e38
    for rows in (w[:1], w[1:2], w[2:3], w[3:4], w[4:], w):
        w_hat = np.asarray(qjax.dequantize(qjax.quantize(rows, fmt)))
        assert np.isfinite(w_hat).all()
        assert (w_hat[rows == 0] == 0).all()
    np.testing.assert_allclose(qjax.dequantize(qjax.quantize(w[1], fmt)), w[1], rtol=1e-6)


def test_names():
    assert [parse(f.name) for f in FORMATS] == list(FORMATS)
    assert parse("FP8_E5M2_b32") == float8("E5M2", "block", 32) and parse("FP8_E5M2_b32").name == "FP8_E5M2_b32"
    assert parse("Q8_0") is None
    with pytest.raises(UserError, match="E4M3 or E5M2"):
        float8("E3M4")
    with pytest.raises(UserError, match="multiple of 128"):
        qjax.quantize(jnp.ones((2, 100)), "FP8_E4M3_b128")
