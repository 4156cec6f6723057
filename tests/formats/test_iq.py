"""Importance grids against ggml itself and against all points: the same floats from the same bytes, a smaller error."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_ggml import errors, importance, tensors

import qjax
from qjax.formats import iq
from qjax.formats.iq.nearest import nearest, tiles

FORMATS = {f.name: f for f in iq.FORMATS}
NAMES = tuple(FORMATS)


def random_blocks(rng, fmt, rows=6, count=8):
    """Arbitrary bytes, the fp16 number finite."""
    raw = rng.integers(0, 256, (rows, count, fmt.block_bytes), dtype=np.uint8)
    if fmt.name == "IQ1_M":
        raw[..., -1] &= 0xBF  # the exponent's top bit
    else:
        raw[..., 1] &= 0xBF
    return raw


@pytest.mark.parametrize("name", NAMES)
def test_decodes_to_the_floats_of_ggml_and_gguf(name, ggml, rng):
    fmt, number = FORMATS[name], gguf.GGMLQuantizationType[name]
    assert (fmt.ggml_type, fmt.block, fmt.block_bytes) == (int(number), *gguf.GGML_QUANT_SIZES[number])
    quantized = ggml.quantize(name, rng.standard_normal((6, 2048)), importance(2048))
    for raw in (random_blocks(rng, fmt), np.frombuffer(quantized, np.uint8).reshape(6, 8, -1)):
        want = ggml.dequantize(name, raw, (6, 2048))
        peer = gguf.quants.dequantize(raw.reshape(6, -1), number)
        np.testing.assert_array_equal(peer.view(np.uint32), want.view(np.uint32))
        q = qjax.from_bytes(name, raw.tobytes(), (6, 2048))
        np.testing.assert_array_equal(np.asarray(qjax.dequantize(q)).view(np.uint32), want.view(np.uint32))
        np.testing.assert_array_equal(jax.jit(lambda x: fmt.pack(*fmt.unpack(x)))(q.leaves)["blocks"], raw)
        scales, codes = fmt.unpack(q.leaves)
        np.testing.assert_array_equal(np.asarray(fmt.decode(scales, codes)).view(np.uint32), want.view(np.uint32))


def all_points(points):
    """Every T that a code may mean, by the code: f64[2^bits, tile]."""
    codes = jnp.arange(1 << points.below_signs, dtype=jnp.uint32)
    return np.float64(points.value(codes[:, None]).reshape(-1, points.tile))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "IQ3_XXS"])  # whose tiles have 2^23 points
def test_nearest_is_the_best_of_all_points(name, rng):
    """In a metric of weights, signs and their number included."""
    points = FORMATS[name].points
    x, v = rng.standard_normal((points.tile, 48)), rng.lognormal(0, 1, (points.tile, 48))
    s = 2.2 / points.levels[-1] * rng.uniform(0.6, 1.2, 48)
    e, code = jax.jit(lambda x, v, s: nearest(tiles(points, x, v), s))(
        *(jnp.asarray(a, jnp.float32) for a in (x, v, s))
    )
    T = np.float64(points.value(code[:, None])).T
    found = (v * (x - s * T) ** 2).sum(axis=0)
    np.testing.assert_allclose(e, found - (v * x * x).sum(axis=0), rtol=1e-4, atol=1e-4)
    side, flips = x, np.zeros((1, points.tile))
    if points.signs != "none":  # the sign of x, but for one where their number is odd
        side = np.abs(x)
        flips = np.eye(points.tile) if points.signs == "even" else flips
    for i in range(48):
        odd = points.signs != "even" or (x[:, i] < 0).sum() % 2 == 1
        signs = 1 - 2 * (flips if odd else 0 * flips)
        T = all_points(points)[:, None] * signs[None]
        least = (v[:, i] * (side[:, i] - s[i] * T) ** 2).sum(axis=-1).min()
        assert found[i] == pytest.approx(least, rel=1e-5)


def test_the_wrong_sign_of_a_pair_of_vectors_is_the_cheapest(rng):
    """IQ3_XXS: eight signs for two vectors, each the best of 256 with the sign and without."""
    points = FORMATS["IQ3_XXS"].points
    x = rng.standard_normal((8, 64))
    code = nearest(tiles(points, jnp.asarray(x, jnp.float32), None), jnp.full((64,), 0.04, jnp.float32))[1]
    T = 0.04 * np.float64(points.value(code[:, None])).T
    vectors = np.concatenate(
        [0.04 * points.vectors * s for s in [np.ones(4), *(1 - 2 * np.eye(4))]]
    )  # one wrong or none
    e = (
        ((np.abs(x).reshape(2, 1, 4, 64) - vectors[None, :, :, None]) ** 2)
        .sum(axis=2)
        .reshape(2, 5, 256, 64)
        .min(axis=2)
    )
    plain, wrong = e[:, 0], e[:, 1:].min(axis=1)
    odd = (x < 0).sum(axis=0) % 2 == 1
    want = np.where(odd, np.minimum(plain[0] + wrong[1], wrong[0] + plain[1]), plain.sum(axis=0))
    np.testing.assert_allclose(((x - T) ** 2).sum(axis=0), want, rtol=1e-5)


# Our error over ggml's on N(0, 1) with importance: measured, plus 0.02.
RATIO = {"IQ2_XXS": 0.9, "IQ2_XS": 0.88, "IQ2_S": 0.915, "IQ3_XXS": 0.91, "IQ3_S": 0.87, "IQ1_S": 0.88, "IQ1_M": 0.89}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_clearly_better_than_ggml(name, ggml, rng):
    w = rng.standard_normal((64, 1024)).astype(np.float32)
    ours, theirs = errors(ggml, name, w, importance(1024))
    assert ours < RATIO[name] * theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_never_worse_than_ggml(name, ggml, rng):
    for kind, w in tensors(rng).items():
        ours, theirs = errors(ggml, name, w, importance(w.shape[-1]))
        assert ours <= theirs * (1 + 1e-6), f"{kind}: {ours} > {theirs}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_however_it_is_called(name, rng):
    w = jnp.asarray(rng.standard_normal((40, 512)), jnp.float32)
    whole = np.asarray(qjax.quantize(w, name).leaves["blocks"])
    np.testing.assert_array_equal(qjax.quantize(w[7:9], name).leaves["blocks"], whole[7:9])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda row: qjax.quantize(row, name).leaves["blocks"]))(w), whole)


@pytest.mark.parametrize("name", ["IQ2_XS", "IQ2_S", "IQ3_S", "IQ1_S"])
def test_a_tile_in_its_own_metric_is_near_the_best_of_all(name, rng):
    fmt = FORMATS[name]
    points, k, rows = fmt.points, fmt.points.tile, 32
    x = rng.standard_normal((64, k)) @ (np.eye(k) + 0.2) * rng.lognormal(0, 0.3, k)
    M = x.T @ x / 64
    t, s = rng.standard_normal((rows, k)), 2.2 / points.levels[-1]
    shift = 0.0 if fmt.scaling.offset is None else s / 8
    columns = jnp.full((rows, 1), s, jnp.float32), None if fmt.scaling.offset is None else jnp.full((rows, 1), s / 8)
    losses = []
    for metric in (None, jnp.asarray(M, jnp.float32)):
        q, code = jax.jit(fmt.round)(columns, jnp.asarray(t[:, None], jnp.float32), metric)
        np.testing.assert_allclose(q[:, 0] - shift, s * points.value(code[:, 0]), rtol=1e-5, atol=1e-6)
        e = np.float64(q)[:, 0] - t
        losses.append(np.einsum("ri,ij,rj->r", e, M, e))
    L = np.linalg.cholesky(M)
    signs = np.ones((1, k))
    if points.signs != "none":
        signs = 1.0 - 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
        signs = signs[signs.prod(axis=1) > 0] if points.signs == "even" else signs
    A = (s * (all_points(points)[:, None] * signs[None]).reshape(-1, k) + shift) @ L
    best = np.array([((row - A) ** 2).sum(axis=1).min() for row in t @ L])
    assert (losses[1] >= best * (1 - 1e-4)).all()
    assert losses[1].sum() < 1.1 * best.sum() and losses[1].sum() < 0.9 * losses[0].sum()
