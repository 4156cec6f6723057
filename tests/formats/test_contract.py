"""The contract: every format x {eager, jit, vmap, scan, grad}, no second compilation, honest bits, idempotence."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import tensor
from qjax.formats.protocol import BlockFormat, Format
from qjax.formats.tiles import bound, round_tiles

ROWS, N = 8, 512

# The least signal-to-noise ratio of N(0, 1) weights, dB: measured on this input, rounded down by 0.2.
SQNR_FLOOR: dict[str, float] = {
    "F32": 199.8,
    "F16": 73.4,
    "BF16": 55.4,
    "Q4_0": 21.2,
    "Q4_1": 22.0,
    "Q5_0": 27.5,
    "Q5_1": 28.3,
    "Q8_0": 45.3,
    "Q2_K": 11.5,
    "Q3_K": 16.6,
    "Q4_K": 23.0,
    "Q5_K": 29.1,
    "Q6_K": 35.5,
    "IQ4_NL": 22.5,
    "IQ4_XS": 22.4,
    "IQ2_XXS": 9.5,
    "IQ2_XS": 10.6,
    "IQ2_S": 12.1,
    "IQ3_XXS": 14.8,
    "IQ3_S": 17.6,
    "IQ1_S": 6.6,
    "IQ1_M": 7.3,
    "TQ1_0": 7.0,
    "TQ2_0": 7.0,
    "Q1_0": 4.2,
    "Q2_0": 7.3,
    "MXFP4": 18.5,
    "NVFP4": 20.2,
    "int8_row": 42.7,
    "int8_g128": 43.9,
    "int4_g128": 19.1,
    "int3_g128": 11.9,
    "int4_g32": 20.6,
    "int4_g128_mse": 19.9,
    "int3_g128_mse": 14.0,
    "int3_g64_mid_mse": 14.8,
    "int2_g64_mid_mse": 9.3,
    "uint4_g128": 19.7,
    "uint3_g128": 13.1,
    "uint4_g32": 21.8,
    "uint2_g64": 6.5,
    "uint3_g64_mse": 14.9,
    "uint2_g64_mse": 8.9,
    "uint4_g64_zf16": 20.7,
    "uint4_g64_m": 20.5,
    "int3_g16_mse_u6x16": 15.6,
    "uint2_g16_mse_u4x16": 10.2,
    "uint3_g16_bilevel3x16": 16.8,
    "NF4": 20.5,
    "NF4_dq": 20.5,
    "FP4": 18.2,
    "FP4_dq": 18.2,
    "lut2": 9.3,
    "lut3": 14.9,
    "lut4": 20.8,
    "FP8_E4M3": 31.2,
    "FP8_E4M3_tensor": 31.2,
    "FP8_E4M3_b128": 31.6,
    "FP8_E5M2": 25.2,
    "FP8_E5M2_tensor": 25.2,
    "FP8_E5M2_b128": 25.4,
    "E8P_2": 10.1,
    "E8P_3": 15.0,
    "E8P_4": 20.3,
    "trellis2_L12_3inst": 11.1,
    "trellis3_L12_3inst": 16.8,
    "trellis4_L12_3inst": 22.5,
    "trellis2_L12_1mad": 11.0,
    "trellis2_L12_mul1": 11.1,
    "trellis2_L12_hyb": 10.9,
    "aqlm_2x8_g8": 24.0,  # 512 tiles have as many entries here: tests/formats/test_additive.py says more
}

# Formats whose search may move a grid point it is given: re-encoding decoded values need not return the same bytes.
SEARCHED: dict[str, str] = {
    "uint2_g16_mse_u4x16": "a super-scale is found again only where one of its scales has the largest code",
    "uint3_g16_bilevel3x16": "rounded scales and zeros have another least and largest",
    "NF4_dq": "the mean of the rounded absmaxes is not the mean of the absmaxes",
    "FP4_dq": "as NF4_dq",
    "Q3_K": "another (d, sc) may lie as near",
    "Q4_K": "another (d, sc, dmin, mn) may lie as near",
    "Q5_K": "as Q4_K",
    "Q6_K": "as Q3_K",
    "IQ4_NL": "the search tries finitely many scales",
    "IQ4_XS": "as IQ4_NL and Q3_K",
    "E8P_2": "the codes look for the rms of what the scale was fitted to afterwards",
    "E8P_3": "as E8P_2",
    "E8P_4": "as E8P_2",
    "trellis2_L12_3inst": "as E8P_2",
    "trellis3_L12_3inst": "as E8P_2",
    "trellis4_L12_3inst": "as E8P_2",
    "trellis2_L12_1mad": "as E8P_2",
    "trellis2_L12_mul1": "as E8P_2",
    "trellis2_L12_hyb": "as E8P_2",
    "aqlm_2x8_g8": "k-means starts from other vectors",
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M"), "as IQ4_NL and Q3_K"),
}

KINDS = (  # of every family one; the others are slow tests
    "F16", "Q4_0", "Q4_1", "Q4_K", "Q3_K", "IQ4_NL", "IQ2_XS", "TQ2_0", "NVFP4", "int4_g128", "uint4_g64_zf16",
    "int3_g16_mse_u6x16", "uint3_g16_bilevel3x16", "NF4_dq", "lut3", "FP8_E5M2_b128", "E8P_3", "trellis2_L12_3inst",
)  # fmt: skip
NAMES = qjax.format_names()
ALL = [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in NAMES]


def normals(rows=ROWS, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, N)).astype(np.float32)


W, TALL = normals(), normals(32)
IMPORTANCE = np.random.default_rng(1).lognormal(0, 1.5, N).astype(np.float32)
X = np.ones((3, N), np.float32)


def weights(name):
    """What a format is tried on: a matrix of which each half has whole tiles."""
    return W if qjax.format(name).rows <= 1 else TALL


def decoded(w, name):
    return qjax.dequantize(qjax.quantize(w, name))


def sqnr(w, w_hat) -> float:
    w, w_hat = np.asarray(w, np.float64), np.asarray(w_hat, np.float64)
    error = ((w - w_hat) ** 2).sum()
    return 10 * np.log10((w**2).sum() / error) if error else np.inf


@cache
def walked(name: str):
    """All that the tests of a format look at, from one compiled program: compiling is what they cost.

    What runs outside of it, `quantize` and `dequantize` of arrays of W's shape, shares two programs more.
    """
    fmt, w = qjax.format(name), weights(name)

    @jax.jit
    def walk(w, h):
        scales, codes = fmt.encode(w)
        fitted = fmt.fit(w)
        stack = jax.vmap(lambda m: qjax.quantize(m, name))(w.reshape(2, -1, N))
        q = qjax.quantize(w, name)
        return {
            "jitted": qjax.dequantize(q),
            "encoded": (scales, codes, fmt.decode(scales, codes)),
            "repacked": fmt.pack(*fmt.unpack(q.leaves)),
            "unpacked": fmt.unpack(q.leaves),
            "nearest": fmt.decode(scales, fmt.nearest(scales, w)),
            "fitted": fmt.decode(fitted, fmt.nearest(fitted, w)),
            "grid": fmt.columns(scales, w.shape),
            "basis": bound(fmt, scales).basis(codes),
            "rounded": round_tiles(bound(fmt, scales), fmt.columns(scales, w.shape), w),
            "again": round_tiles(bound(fmt, scales), fmt.columns(scales, w.shape), fmt.decode(scales, codes)),
            "stored": fmt.store(scales, fmt.columns(scales, w.shape)),
            "stack": stack,
            "scanned": lax.scan(lambda c, one: (c, qjax.dequantize(one)), 0, stack)[1],
            "gradient": jax.grad(lambda x: qjax.dot(x, q).sum())(jnp.asarray(X)),
            "weighted": qjax.dequantize(qjax.quantize(w, name, weight=h)),
        }

    return fmt, qjax.quantize(w, name), walk(jnp.asarray(w), jnp.asarray(IMPORTANCE))


def floor(name: str) -> float:
    """What was measured; of a format that is new here, the ratio of `uint2_g64`, the least of the table's integers."""
    return SQNR_FLOOR.get(name, 2.8 * qjax.format(name).bits_per_weight)


def test_the_table_names_formats_that_there_are():
    assert set(SQNR_FLOOR) <= set(NAMES) > set(KINDS)
    assert all(qjax.format(name).about for name in NAMES)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ALL)
def test_format(name):
    (fmt, q, found), W = walked(name), weights(name)
    assert isinstance(fmt, Format) and fmt.name == name and hash(fmt) == hash(qjax.format(name))
    w_hat = qjax.dequantize(q)
    assert q.shape == W.shape and w_hat.dtype == jnp.float32

    # quality
    assert sqnr(W, w_hat) >= floor(name)

    # bits: the leaves' own, and the format's claim of them
    leaves = jax.tree.leaves(q.leaves)
    true_bits = 8 * sum(np.asarray(leaf).nbytes for leaf in leaves) / W.size
    assert q.bits_per_weight == pytest.approx(true_bits)
    if fmt.block:
        per_tensor = 32 / N if name.endswith(("_dq", "_tensor")) else 0.0
        padding = 7 / N if "zero" in q.leaves else 0.0  # a stream of integer zeros ends on a byte
        assert true_bits == pytest.approx(fmt.bits_per_weight, abs=per_tensor + padding + 1e-9)
    if isinstance(fmt, BlockFormat):
        assert true_bits == 8 * fmt.block_bytes / fmt.block
        assert len(qjax.to_bytes(q)) == W.size // fmt.block * fmt.block_bytes

    # pack and unpack are inverse, and encode is what quantize stores
    _scales, codes, encoded = found["encoded"]
    assert codes.shape == W.shape if fmt.tile == (1, 1) else codes.shape[:-1] == W.shape[:-1]
    np.testing.assert_array_equal(found["unpacked"][1], codes)
    for key, leaf in q.leaves.items():
        np.testing.assert_array_equal(found["repacked"][key], leaf)
    np.testing.assert_array_equal(encoded, w_hat)

    # fit and nearest alone (what other roundings build on) reach about the same error
    assert sqnr(W, found["fitted"]) >= floor(name) - 0.5


@pytest.mark.parametrize("name", ALL)
def test_transformations(name):
    """Eager is jit, vmap and scan; the gradient is that of the decoded weights; an axis is only a place."""
    (fmt, q, found), W = walked(name), weights(name)
    w_hat = np.asarray(qjax.dequantize(q))
    np.testing.assert_array_equal(found["jitted"], w_hat)
    stack = found["stack"]
    assert stack.shape == (2, len(W) // 2, N)
    if fmt.rows != 0:  # the rows of another matrix do not matter
        np.testing.assert_array_equal(found["scanned"], w_hat.reshape(2, -1, N))
    else:
        np.testing.assert_array_equal(found["scanned"], [decoded(m, name) for m in W.reshape(2, -1, N)])
    np.testing.assert_allclose(found["gradient"][0], w_hat.sum(axis=0), rtol=1e-4, atol=1e-3)
    column = qjax.quantize(W.T, name, axis=0)
    assert column.shape == W.T.shape
    for key, leaf in q.leaves.items():
        np.testing.assert_array_equal(column.leaves[key], leaf)


@pytest.mark.parametrize("name", ALL)
def test_abstract_shapes_and_no_second_compilation(name):
    walked(name)
    W = weights(name)
    assert jax.eval_shape(lambda w: qjax.quantize(w, name), W).shape == W.shape
    before = tensor._encode._cache_size(), tensor.dequantize._cache_size()
    qjax.dequantize(qjax.quantize(2 * W, name))
    assert (tensor._encode._cache_size(), tensor.dequantize._cache_size()) == before


@pytest.mark.parametrize("name", ALL)
def test_a_grid_point_stays(name):
    w_hat = qjax.dequantize(walked(name)[1])
    again = qjax.quantize(w_hat, name)
    if name in SEARCHED:
        assert sqnr(w_hat, qjax.dequantize(again)) > floor(name) + 6, SEARCHED[name]
    else:
        np.testing.assert_allclose(qjax.dequantize(again), w_hat, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_the_grid_is_what_decode_gives(name):
    """w_hat = sum s T + m by the basis, rounding tile by tile finds the codes, and storing the grid changes nothing."""
    (fmt, _, found), W = walked(name), weights(name)
    scales, codes, w_hat = found["encoded"]
    (*theta, m), B = found["grid"], found["basis"]
    s = theta[0]
    assert s.shape[:-1] == W.shape[:-1] and N % s.shape[-1] == 0
    assert all(c.shape == s.shape for c in (*theta, s if m is None else m))
    wide, offset = ([np.repeat(c, N // s.shape[-1], axis=-1) for c in cs] for cs in (theta, [] if m is None else [m]))
    made = sum([s * T for s, T in zip(wide, B, strict=True)], *offset or [0.0])
    np.testing.assert_allclose(made, w_hat, rtol=1e-5, atol=1e-6)
    for value, code in (found["rounded"], found["again"]):
        assert code.dtype == codes.dtype and code.shape == codes.shape
        np.testing.assert_allclose(value, fmt.decode(scales, code), rtol=1e-5, atol=1e-6)
    if name != "E8P_4":  # its first code takes the nearest point, and may leave its second less than there was
        np.testing.assert_allclose(found["again"][0], w_hat, rtol=1e-5, atol=1e-6)
    # the level nearest to w itself is the code that `nearest` picks
    off = np.abs(found["rounded"][0] - found["nearest"]) > 1e-5 * (1 + np.abs(W))
    assert off.mean() < 1e-3  # ties may go the other way
    if fmt.rows == 1:
        assert jax.tree.structure(found["stored"]) == jax.tree.structure(scales)
        for key in scales:
            assert found["stored"][key].dtype == scales[key].dtype
            np.testing.assert_array_equal(found["stored"][key], scales[key])


@pytest.mark.parametrize("name", ALL)
def test_degenerate_rows_stay_finite(name):
    """Zero, constant, tiny, huge and one-outlier rows decode to finite numbers near what they were."""
    rows = np.zeros(weights(name).shape, np.float32)
    rows[1] = 0.37
    rows[2] = 1e-30
    rows[3, ::2], rows[3, 1::2] = 1e4, -1e4
    rows[4, 17] = 100.0
    rows[5] = -0.37
    w_hat = np.asarray(decoded(rows, name))
    assert np.isfinite(w_hat).all()
    assert (w_hat[0] == 0).all()
    if not name.endswith("_dq"):  # absmaxes of all rows share one 8-bit grid there
        assert np.abs(w_hat[2]).max() < 1e-3


@pytest.mark.parametrize("name", ALL)
def test_importance_lowers_the_weighted_error(name):
    (_, q, found), W = walked(name), weights(name)
    error = [float((IMPORTANCE * (np.float64(x) - W) ** 2).sum()) for x in (qjax.dequantize(q), found["weighted"])]
    assert error[1] <= error[0] * (1 + 1e-6)
