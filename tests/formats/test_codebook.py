"""NF4 and FP4 against bitsandbytes itself, where it is installed, and against plain NumPy everywhere."""

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.errors import UserError
from qjax.formats.codebook import FORMATS, LEVELS, codebook, parse
from qjax.formats.codebook_search import search_absmax
from qjax.formats.dynamic_map import dynamic_map, from_dynamic, to_dynamic
from qjax.formats.integer_search import search_scale
from qjax.rounding.ranges import level

pytestmark = pytest.mark.optimized  # the very codes of bitsandbytes

SINGLE = [f for f in FORMATS if not f.scaling.double]
BLOCKS = (32, 64, 128, 4096)


@pytest.fixture(scope="module")
def bnb():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.set_num_threads(1)
    return functional


@pytest.fixture(scope="module")
def w():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((96, 4096)).astype(np.float32) * rng.lognormal(0, 1, (96, 1)).astype(np.float32)
    w[3, 64:192] = 0
    w[4] = 0.37
    w[5] = -1e-4
    w[6, 17] = 100
    return w


def quantized_by(bnb, w, levels, block, double):
    import torch

    q, state = bnb.quantize_4bit(
        torch.from_numpy(w.copy()), blocksize=block, quant_type=levels.lower(), compress_statistics=double
    )
    return q.numpy().reshape(w.shape[0], -1), state, bnb.dequantize_4bit(q, state).numpy()


def unpacked(fmt, leaves):
    return np.asarray(fmt.unpack(leaves)[1])


# bitsandbytes as the judge


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("levels", LEVELS)
def test_codes_absmax_and_values_are_those_of_bitsandbytes(bnb, w, levels, block):
    theirs, state, values = quantized_by(bnb, w, levels, block, double=False)
    fmt = codebook(levels, block)
    q = qjax.quantize(w, fmt)
    np.testing.assert_array_equal(np.asarray(q.leaves["absmax"]).ravel(), state.absmax.numpy())
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(q)), values)
    if levels == "NF4":  # FP4 has two codes for zero
        np.testing.assert_array_equal(np.asarray(q.leaves["codes"]).reshape(theirs.shape), theirs)
    np.testing.assert_array_equal(np.float32(LEVELS[levels].values), state.code.numpy())
    # their packed codes, read by us
    packed = jnp.asarray(theirs.reshape(*w.shape[:-1], -1, block // 2))
    read = qjax.tensor.QTensor({"codes": packed, "absmax": q.leaves["absmax"]}, fmt)
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(read)), values)


@pytest.mark.slow
def test_ties_go_where_bitsandbytes_sends_them(bnb):
    for levels, table in ((name, np.float32(t.values)) for name, t in LEVELS.items()):
        table = np.sort(table)
        middles = (table[1:] + table[:-1]) / np.float32(2)
        row = np.concatenate([middles, np.nextafter(middles, np.float32(2)), np.nextafter(middles, np.float32(-2))])
        row = np.resize(np.concatenate([[np.float32(1)], row]), 64).astype(np.float32)[None]
        _, _, values = quantized_by(bnb, row, levels, 64, double=False)
        np.testing.assert_array_equal(np.asarray(qjax.dequantize(qjax.quantize(row, levels))), values)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rows", (96, 5, 1))
@pytest.mark.parametrize("levels", LEVELS)
def test_double_quantization_is_that_of_bitsandbytes(bnb, w, levels, rows):
    """5 rows of 64 blocks leave a short last group of 256 absmaxes; 1 row is shorter than one group."""
    w = w[:rows]
    theirs, state, values = quantized_by(bnb, w, levels, 64, double=True)
    fmt = codebook(levels, 64, True)

    # their file, read by us: the same floats to the last bit
    nested = state.state2
    assert nested.blocksize == 256
    leaves = {
        "codes": theirs.reshape(rows, -1, 32),
        "absmax": state.absmax.numpy().reshape(rows, -1),
        "nested_absmax": nested.absmax.numpy()[None],
        "offset": state.offset.numpy().reshape(1, 1),
    }
    read = qjax.tensor.QTensor(jax.tree.map(jnp.asarray, leaves), fmt)
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(read)), values)

    # ours: codes of the weights equal; offset within the rounding of a sum; codes of the absmax equal but where a
    # residual lies within 2^-14 of a midpoint, because bitsandbytes looks it up in a table of 2^16 steps
    q = qjax.quantize(w, fmt)
    if levels == "NF4":
        np.testing.assert_array_equal(np.asarray(q.leaves["codes"]), leaves["codes"])
    np.testing.assert_allclose(np.asarray(q.leaves["offset"]), leaves["offset"], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(q.leaves["nested_absmax"]), leaves["nested_absmax"], rtol=1e-5)
    mine, their = np.asarray(q.leaves["absmax"]).ravel().astype(int), leaves["absmax"].ravel().astype(int)
    assert np.abs(mine - their).max() <= 1
    differ = np.nonzero(mine != their)[0]
    table = dynamic_map()
    residual = np.abs(w.reshape(-1, 64)).max(-1)[differ] - leaves["offset"].ravel()
    residual = residual / leaves["nested_absmax"].ravel()[differ // 256]
    middle = (table[mine[differ]] + table[their[differ]]) / 2
    assert (np.abs(residual - middle) < 2.0**-14).all()
    assert differ.size <= 0.01 * mine.size
    np.testing.assert_array_equal(nested.code.numpy(), table)


def test_the_dynamic_map_is_that_of_bitsandbytes(bnb):
    np.testing.assert_array_equal(dynamic_map(), bnb.create_dynamic_map().numpy())


# without a peer


def test_the_dynamic_map():
    """The digest is of the 1024 bytes bitsandbytes makes."""
    table = dynamic_map()
    assert table.dtype == np.float32 and table.shape == (256,) and (np.diff(table) > 0).all()
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(table.tobytes()).hexdigest() == digest


def test_nf4_levels_are_the_normal_quantiles():
    from statistics import NormalDist

    offset, normal = 0.9677083, NormalDist()
    up = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    down = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    table = np.sort(np.array([*up, 0.0, *down])) / max(up)
    np.testing.assert_allclose(LEVELS["NF4"].values, table, atol=5e-8)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fmt", SINGLE, ids=lambda f: f.name)
def test_the_search_finds_what_an_even_grid_of_96_finds(fmt, rng):
    """With 41 candidates, compared and not looked up: a gather does not vectorize, and cost nine tenths of the time."""
    w = jnp.asarray(rng.standard_normal((32, 1024)), jnp.float32)
    h = jnp.asarray(rng.lognormal(0, 1.5, w.shape), jnp.float32)
    x, v = (a.reshape(32, 16, 64) for a in (w, h))

    def error(s):
        return float(jnp.sum(v * (x - s[..., None] * level(fmt, x / s[..., None])) ** 2))

    even = search_scale(x, v, partial(level, fmt), jnp.max(jnp.abs(x), axis=-1), low=0.5)
    assert error(search_absmax(w, h, 64, fmt.levels)) <= error(even)
    assert "gather" not in str(jax.make_jaxpr(lambda w: search_absmax(w, h, 64, fmt.levels))(w))


@pytest.mark.parametrize("fmt", SINGLE, ids=lambda f: f.name)
def test_against_numpy(fmt, w):
    """Nearest level by brute force; high nibble first; absmax as it is."""
    w = w[:8]
    q = qjax.quantize(w, fmt)
    absmax = np.abs(w.reshape(8, -1, 64)).max(-1)
    np.testing.assert_array_equal(np.asarray(q.leaves["absmax"]), absmax)
    table = np.float64(np.float32(fmt.levels.values))
    best = np.abs(w.reshape(8, -1, 64, 1) - absmax[..., None, None] * table).min(-1)
    mine = np.abs(w - np.asarray(qjax.dequantize(q))).reshape(best.shape)
    np.testing.assert_allclose(mine, best, atol=1e-6 * absmax.max())
    bytes_ = np.asarray(q.leaves["codes"])
    codes = unpacked(fmt, q.leaves).reshape(*bytes_.shape[:-1], -1)
    np.testing.assert_array_equal(bytes_, codes[..., 0::2] * 16 + codes[..., 1::2])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_all_codes_decode_to_the_table(fmt):
    codes = jnp.resize(jnp.arange(16, dtype=jnp.uint8), (1, 64))
    scales = {"absmax": jnp.full((1, 1), 3.0, jnp.float32)}
    scales = to_dynamic(scales["absmax"]) if fmt.scaling.double else scales
    values = fmt.decode(scales, codes)
    np.testing.assert_array_equal(np.asarray(values)[0, :16], np.float32(fmt.levels.values) * np.float32(3))
    np.testing.assert_array_equal(jax.jit(fmt.decode)(scales, codes), values)
    packed = fmt.pack(scales, codes)
    np.testing.assert_array_equal(unpacked(fmt, packed), codes)


def test_gaussian_error(rng):
    """ptq oracle: 0.0084 for NF4 in blocks of 64; double quantization costs next to nothing."""
    w = rng.standard_normal((256, 1024)).astype(np.float32)
    error = {name: float(((qjax.dequantize(qjax.quantize(w, name)) - w) ** 2).mean()) for name in ("NF4", "NF4_dq")}
    assert error["NF4"] == pytest.approx(0.0084, rel=0.03)
    assert error["NF4_dq"] == pytest.approx(error["NF4"], rel=0.02)


def test_double_quantization_by_numpy(rng):
    absmax = rng.lognormal(0, 0.3, (2, 7, 50)).astype(np.float32)
    scales = to_dynamic(jnp.asarray(absmax))
    assert scales["nested_absmax"].shape == (2, 1, 2) and scales["offset"].shape == (2, 1, 1)
    table = dynamic_map().astype(np.float64)
    for i in range(2):
        flat = absmax[i].ravel().astype(np.float64)
        np.testing.assert_allclose(scales["offset"][i, 0, 0], flat.mean(), rtol=1e-6)
        rest = flat - flat.mean()
        for j, part in enumerate((rest[:256], rest[256:])):
            nested = np.abs(part).max()
            np.testing.assert_allclose(scales["nested_absmax"][i, 0, j], nested, rtol=1e-5)
            values = np.asarray(from_dynamic(scales))[i].ravel()[256 * j :][: part.size]
            best = np.abs(part[:, None] / nested - table).min(-1)
            mine = np.abs((values - flat.mean()) - part) / nested
            np.testing.assert_allclose(mine, best, atol=1e-5)
    np.testing.assert_array_equal(jax.jit(from_dynamic)(scales), from_dynamic(scales))
    jitted = jax.jit(to_dynamic)(jnp.asarray(absmax))
    for key, value in scales.items():
        np.testing.assert_array_equal(jitted[key], value)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_stack_of_matrices_is_each_matrix(fmt, rng):
    w = jnp.asarray(rng.standard_normal((3, 10, 256)), jnp.float32)
    direct = fmt.pack(*fmt.encode(w))
    mapped = jax.vmap(lambda m: fmt.pack(*fmt.encode(m)))(w)
    jitted = jax.jit(lambda m: fmt.pack(*fmt.encode(m)))(w)
    for key, leaf in direct.items():
        np.testing.assert_array_equal(mapped[key], leaf)
        np.testing.assert_array_equal(jitted[key], leaf)
    assert fmt.shape(direct) == w.shape
    one = qjax.quantize(w[0, 0], fmt)
    assert one.shape == (256,) and np.isfinite(qjax.dequantize(one)).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_bits_and_grid_points(fmt, rng):
    w = rng.standard_normal((128, 512)).astype(np.float32)
    q = qjax.quantize(w, fmt)
    offset = 32 / w.size if fmt.scaling.double else 0
    assert q.bits_per_weight == pytest.approx(fmt.bits_per_weight + offset)
    w_hat = qjax.dequantize(q)
    np.testing.assert_allclose(
        qjax.dequantize(qjax.quantize(w_hat, fmt)), w_hat, rtol=2e-2 if fmt.scaling.double else 0
    )


@given(exponent=st.integers(-40, 40), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_power_of_two_goes_through(exponent, seed):
    w = np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)
    scaled = qjax.dequantize(qjax.quantize(w * np.float32(2.0**exponent), "NF4"))
    np.testing.assert_array_equal(scaled, qjax.dequantize(qjax.quantize(w, "NF4")) * 2.0**exponent)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_a_weight_never_raises_the_weighted_error(fmt, rng):
    w = rng.standard_normal((16, 256)).astype(np.float32)
    h = rng.lognormal(0, 2, w.shape).astype(np.float32)
    h[3] = 0

    def error(q):
        return (h * (np.asarray(qjax.dequantize(q)) - w) ** 2).reshape(16, -1, 64).sum(-1)

    plain, weighted = error(qjax.quantize(w, fmt)), error(qjax.quantize(w, fmt, weight=jnp.asarray(h)))
    if fmt.scaling.double:
        assert weighted.sum() < 0.9 * plain.sum()
    else:
        assert (weighted <= plain * (1 + 1e-5)).all()
        assert weighted.sum() < 0.8 * plain.sum()


def test_degenerate_blocks():
    w = np.zeros((5, 64), np.float32)
    w[1], w[2, 7], w[3] = -0.25, 1e30, 1e-42
    w[4, ::2] = 8e37  # 1 / absmax is still no denormal
    for fmt in FORMATS:
        w_hat = np.asarray(qjax.dequantize(qjax.quantize(w[:4] if fmt.scaling.double else w, fmt)))
        assert np.isfinite(w_hat).all()
        np.testing.assert_array_equal(w_hat[0], 0)
        if not fmt.scaling.double:
            np.testing.assert_array_equal(w_hat[[1, 2, 4]], w[[1, 2, 4]])


def test_names():
    assert [parse(f.name) for f in FORMATS] == list(FORMATS)
    assert parse("NF4_b128_dq") == codebook("NF4", 128, True) and parse("NF4_b128_dq").name == "NF4_b128_dq"
    assert parse("NF4_b64").name == "NF4" and parse("Q4_0") is None
    with pytest.raises(UserError, match="powers of two from 32 to 4096"):
        parse("FP4_b48")
