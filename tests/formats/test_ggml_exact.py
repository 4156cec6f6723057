"""ggml's exact types against ggml (C) and gguf-py: values bit for bit, bytes without importance, error with it."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

import qjax
from qjax.formats import exact, ggml_dense, ggml_fp4, ggml_simple
from qjax.formats.protocol import BlockFormat
from qjax.formats.storage import quotient

pytestmark = pytest.mark.optimized  # the very bytes and values of ggml

FORMATS = {f.name: f for m in (ggml_dense, ggml_simple, ggml_fp4) for f in m.FORMATS}
NAMES = tuple(FORMATS)
QUANTIZED = tuple(n for n in NAMES if n not in ("F32", "F16", "BF16"))
ROWS, N = 32, 2048


def encoded(name, w, weight=None):
    return np.frombuffer(qjax.to_bytes(qjax.quantize(w, name, weight=weight)), np.uint8)


def decoded(name, raw, shape):
    return np.asarray(qjax.dequantize(qjax.from_bytes(name, raw, shape)))


def inputs(rng):
    """Weights that hit what may go wrong: signs of zeros, ties, outliers, fp16 subnormals and float32 denormals.

    Returns: f32[rows, 512] and the label of each row.
    """
    normal = rng.standard_normal((32, 512))
    outlier = normal.copy()
    outlier[np.arange(32), rng.integers(0, 512, 32)] *= 1000
    zeros = np.where(rng.random((32, 512)) < 0.5, 0.0, -0.0)
    cases = {
        "normal": rng.standard_normal((1024, 512)),
        "zero": np.zeros((2, 512)),
        "signed zeros": zeros,
        "signed zeros among positives": np.where(rng.random(normal.shape) < 0.3, zeros, np.abs(normal)),
        "signed zeros among negatives": np.where(rng.random(normal.shape) < 0.3, zeros, -np.abs(normal)),
        "constant": np.full((2, 512), 0.37),
        "negative constant": np.full((2, 512), -1.3),
        "ties": rng.integers(-16, 17, (64, 512)) / 8,
        "halves": rng.integers(-254, 255, (64, 512)) / 2,
        "plus and minus absmax": rng.choice([-0.7, 0.7, 0.1], (32, 512)),
        "positive": np.abs(normal) + 3,
        "far from zero": 100 + 1e-3 * normal,
        "outliers": outlier,
        "large": 1e4 * normal,
        "heavy tails": rng.standard_t(2, (32, 512)),
        **{f"fp16 subnormal scale {s}": s * normal for s in (3e-5, 1e-6, 3e-7, 3e-8)},
        **{f"2^{e}": normal * 2.0**e for e in (-30, -33, -60, -100, -112, -116)},
    }
    labels = [label for label, w in cases.items() for _ in w]
    return np.concatenate(list(cases.values())).astype(np.float32), labels


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NAMES)
def test_decode_is_bit_equal(name, ggml, rng):
    fmt = FORMATS[name]
    assert isinstance(fmt, BlockFormat) and fmt.ggml_type == int(gguf.GGMLQuantizationType[name])
    assert (fmt.block, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    random = rng.integers(0, 256, (ROWS, N // fmt.block * fmt.block_bytes), dtype=np.uint8)
    real = np.frombuffer(ggml.quantize(name, rng.standard_normal((ROWS, N))), np.uint8).reshape(ROWS, -1)
    for raw in (random, real):
        w = decoded(name, raw, (ROWS, N))
        c = ggml.dequantize(name, raw, (ROWS, N))
        with np.errstate(invalid="ignore", over="ignore"):
            py = gguf_dequantize(raw, gguf.GGMLQuantizationType[name])
        # random fp16 scales may be NaN or Inf: their payloads are the platform's
        valid = np.isfinite(c) if name not in ("F32", "MXFP4") else np.ones(c.shape, bool)
        if name in ("MXFP4", "NVFP4"):  # E8M0 and E4M3 have a NaN, which ggml reads as a number and never writes
            scales = raw.reshape(ROWS, -1, fmt.block_bytes)[..., : 1 if name == "MXFP4" else 4]
            no_number = np.repeat((scales == 0xFF).reshape(ROWS, -1), 32 if name == "MXFP4" else 16, axis=1)
            np.testing.assert_array_equal(np.isnan(w), no_number)
            valid &= ~no_number
        assert valid.mean() > 0.8
        for other in (c, py):
            np.testing.assert_array_equal(w.view(np.uint32)[valid], other.view(np.uint32)[valid])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_encode_gives_ggmls_bytes(name, ggml, rng):
    w, labels = inputs(rng)
    if name == "Q8_0":  # 1 / d must be finite for C to be defined
        w[np.array(labels) == "2^-116"] *= 16
    theirs = np.frombuffer(ggml.quantize(name, w), np.uint8).reshape(len(w), -1)
    wrong = np.any(encoded(name, w).reshape(theirs.shape) != theirs, axis=1)
    assert not wrong.any(), {labels[row] for row in np.flatnonzero(wrong)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_encode_gives_ggmls_bytes_on_millions(name, ggml):
    rng = np.random.default_rng(7)
    shape = (1024, 2048)
    lattice = np.round(4 * rng.standard_normal(shape)) * np.exp(rng.standard_normal((shape[0], 1)))
    for w in (
        rng.standard_normal(shape) * np.exp(3 * rng.standard_normal((shape[0], 1))),
        rng.standard_t(2, shape),
        lattice,
    ):
        w = w.astype(np.float32)
        np.testing.assert_array_equal(encoded(name, w), np.frombuffer(ggml.quantize(name, w), np.uint8))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "NVFP4"])
def test_encode_gives_gguf_pys_bytes(name, rng):
    w = rng.standard_normal((ROWS, N)).astype(np.float32)
    expected = gguf_quantize(w, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(encoded(name, w), expected.view(np.uint8).reshape(-1))


def test_mxfp4_takes_the_exponent_of_a_rounded_logarithm(ggml):
    """log2f of the numbers just below a power of two rounds up to it, the farther from 1 the more of them."""
    k = np.arange(-124, 129, dtype=np.float64)[:, None]
    peaks = 2.0**k * (1 - np.arange(129) * 2.0**-24)
    w = np.zeros((peaks[peaks < np.finfo(np.float32).max].size, 32), np.float32)
    w[:, 0] = peaks[peaks < np.finfo(np.float32).max]
    np.testing.assert_array_equal(encoded("MXFP4", w), np.frombuffer(ggml.quantize("MXFP4", w), np.uint8))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NAMES)
def test_eager_and_vmap_give_the_same_bytes(name, rng):
    fmt = FORMATS[name]
    w = jnp.asarray(rng.standard_normal((4, 2, 512)), jnp.float32)

    def bytes_of(w):
        return fmt.pack(*fmt.encode(w))["blocks"]

    jitted = np.asarray(jax.jit(bytes_of)(w))
    assert fmt.shape({"blocks": jitted}) == w.shape
    if name in ("Q4_0", "Q5_1", "Q8_0"):
        np.testing.assert_array_equal(jitted, bytes_of(w))
    np.testing.assert_array_equal(jitted, jax.jit(jax.vmap(bytes_of))(w))
    abstract = jax.eval_shape(bytes_of, jax.ShapeDtypeStruct(w.shape, jnp.float32))
    assert (abstract.shape, abstract.dtype) == (jitted.shape, jnp.uint8)
    scales, codes = jax.eval_shape(lambda b: fmt.unpack({"blocks": b}), abstract)
    assert codes.shape == w.shape and jax.eval_shape(fmt.decode, scales, codes).shape == w.shape


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_pack_inverts_unpack_and_grid_points_stay(name, rng):
    fmt = FORMATS[name]
    w = rng.standard_normal((ROWS, 512)).astype(np.float32)
    q = qjax.quantize(w, name)
    repacked = jax.jit(lambda leaves: fmt.pack(*fmt.unpack(leaves)))(q.leaves)
    np.testing.assert_array_equal(repacked["blocks"], q.leaves["blocks"])
    again = qjax.quantize(qjax.dequantize(q), name)
    if name in (
        "Q4_1",
        "Q5_1",
    ):  # 15 d + m is rounded to float32, so d may come back one fp16 step off: rarely
        assert np.mean(np.asarray(again.leaves["blocks"]) != np.asarray(q.leaves["blocks"])) < 1e-3
    else:
        np.testing.assert_array_equal(again.leaves["blocks"], q.leaves["blocks"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_blocks_commute(name, weighted, rng):
    block = FORMATS[name].block
    w = rng.standard_normal((2, 8, block)).astype(np.float32)
    im = rng.random(w.shape, np.float32) if weighted else None
    order = rng.permutation(8)

    def blocks(w, im):
        im = None if im is None else im.reshape(2, -1)
        return np.asarray(qjax.quantize(w.reshape(2, -1), name, weight=im).leaves["blocks"])

    permuted = blocks(w[:, order], None if im is None else im[:, order])
    np.testing.assert_array_equal(permuted, blocks(w, im)[:, order])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", QUANTIZED)
def test_nearest_is_the_nearest_level(name, rng):
    fmt = FORMATS[name]
    w = jnp.asarray(rng.standard_normal((4, 512)), jnp.float32)
    scales = jax.jit(fmt.fit)(w)
    codes = jax.jit(fmt.nearest)(scales, w)
    decode = jax.jit(fmt.decode)
    chosen = np.abs(np.asarray(decode(scales, codes) - w))
    for code in range(int(codes.min()), int(codes.max()) + 1):
        other = np.abs(np.asarray(decode(scales, jnp.full(w.shape, code, codes.dtype)) - w))
        assert np.all(chosen <= other * (1 + 1e-6) + 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0, 1, 3])
@pytest.mark.parametrize("name", QUANTIZED)
def test_importance_is_never_worse_than_plain_or_ggml(name, spread, ggml, rng):
    im = np.exp(spread * rng.standard_normal(512)).astype(np.float32)
    if spread == 3:
        im[rng.random(512) < 0.2] = 0  # channels that never fire
        im[:256] = 0
    cases = {
        "normal": rng.standard_normal((64, 512)),
        "heavy tails": rng.standard_t(2, (64, 512)),
        "positive": np.abs(rng.standard_normal((64, 512))) + 1,
        "subnormal scale": 3e-6 * rng.standard_normal((64, 512)),
        "lattice": 0.01 * rng.integers(-7, 8, (64, 512)),
        "one row": rng.standard_normal((1, 512)),
        "zero": np.zeros((2, 512)),
    }
    w = np.concatenate(list(cases.values())).astype(np.float32)
    ours = encoded(name, w, weight=im).reshape(len(w), -1)
    plain, theirs = (np.frombuffer(b, np.uint8) for b in (ggml.quantize(name, w), ggml.quantize(name, w, im)))

    def error(raw, at):
        off = w.astype(np.float64) - ggml.dequantize(name, raw, w.shape)
        return float((im * off**2)[at].sum())

    start = 0
    for label, case in cases.items():
        at = slice(start, start + len(case))
        start = at.stop
        bound = min(error(plain, at), error(theirs, at))
        assert error(ours, at) <= bound * (1 + 1e-6), label
        if label == "normal":
            assert error(ours, at) < 0.99 * bound


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "TQ2_0", "MXFP4"])
def test_only_ratios_of_importance_matter(name, rng):
    w = jnp.asarray(rng.standard_normal((4, 512)), jnp.float32)
    im = jnp.asarray(rng.random((4, 512)), jnp.float32)
    expected = encoded(name, w, im)
    for scale in (2.0**-90, 2.0**60):
        np.testing.assert_array_equal(encoded(name, w, im * scale), expected)


def test_dense_types_keep_every_bit(rng):
    bits = rng.integers(0, 2**32, (4, 256), dtype=np.uint32)
    fmt = FORMATS["F32"]
    np.testing.assert_array_equal(jax.jit(fmt.nearest)({}, jnp.asarray(bits.view(np.float32))), bits)
    half = np.arange(2**16, dtype=np.uint16)
    for name in ("F16", "BF16"):
        fmt = FORMATS[name]
        back = jax.jit(lambda h, fmt=fmt: fmt.nearest({}, fmt.decode({}, h)))(jnp.asarray(half))
        finite = np.isfinite(np.asarray(fmt.decode({}, jnp.asarray(half))))
        np.testing.assert_array_equal(np.asarray(back)[finite], half[finite])


def test_exact_arithmetic_under_jit(rng):
    """The three ways of `exact` to get C's bits from XLA."""
    a, b = rng.standard_normal((2, 4096)).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda a, b: exact.apart(a * b, 1e9) + 8.5)(a, b), a * b + np.float32(8.5))
    for c in (6, 15, 31, 127):
        np.testing.assert_array_equal(jax.jit(lambda a, c=c: quotient(a, c))(a), a / np.float32(c))
    small = (a * 2.0**-130).astype(np.float32).reshape(-1, 32)
    small[0, 0] = -0.0
    lifted = jax.jit(lambda x: exact.lift(x, exact.tiny(x)))(small)
    np.testing.assert_array_equal(np.asarray(lifted), (small.astype(np.float64) * 2.0**64).astype(np.float32))
    assert np.signbit(lifted[0, 0])
