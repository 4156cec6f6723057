"""Bilevel groups by plain NumPy: both levels as the paper writes them, bits as stored, equal sets as exact grids."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.formats.bilevel import bilevel, parse

NAMES = ("uint3_g16_bilevel3x16", "uint2_g8_bilevel4x8", "uint4_g32_bilevel6x4")


def second(v, groups, bits):
    """min-max codes of v [rows, G] in sets of `groups`: codes, and the values that they stand for."""
    sets = v.reshape(len(v), -1, groups)
    low = sets.min(-1, keepdims=True).astype(np.float16).astype(np.float64)
    step = ((sets.max(-1, keepdims=True) - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    codes = np.clip(np.round((sets - low) / np.where(step > 0, step, 1)), 0, 2**bits - 1)
    return codes.reshape(v.shape), (low + step * codes).reshape(v.shape)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_affine_in_two_levels(name, rng):
    fmt = parse(name)
    w = (rng.standard_normal((16, 512)) + 0.4 * rng.standard_normal((16, 1))).astype(np.float32)
    top = fmt.levels.high
    x = np.float64(w).reshape(16, -1, fmt.scaling.group)
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    s_codes, s = second((high - low) / top, fmt.scaling.groups, fmt.scaling.second)
    z_codes, z = second(np.clip(-low / s, 0, top), fmt.scaling.groups, fmt.scaling.second)
    codes = np.clip(np.round(x / s[..., None] + z[..., None]), 0, top)
    scales, mine = fmt.unpack(qjax.quantize(w, name).leaves)
    for ours, theirs in ((scales["scale"], s_codes), (scales["zero"], z_codes), (mine, codes.reshape(w.shape))):
        assert np.mean(np.asarray(ours) != theirs) < 2e-3  # float32: ties
    same = np.asarray(mine) == codes.reshape(w.shape)
    w_hat = (s[..., None] * (codes - z[..., None])).reshape(w.shape)
    np.testing.assert_allclose(np.asarray(qjax.dequantize(qjax.quantize(w, name)))[same], w_hat[same], atol=0.02)


@pytest.mark.parametrize(("name", "bits"), [(NAMES[0], 3.625), (NAMES[1], 4.0), (NAMES[2], 4.875)])
def test_bits(name, bits, rng):
    q = qjax.quantize(rng.standard_normal((8, 512)).astype(np.float32), name)
    assert q.bits_per_weight == qjax.format(name).bits_per_weight == bits
    assert qjax.format(name) == parse(name) and parse(name).name == name


@pytest.mark.slow
def test_more_bits_above_lose_less(rng):
    """With more bits of scales and zeros the error falls to that of groups with f16 scales and zeros."""
    w = jnp.asarray(rng.standard_normal((64, 1024)), jnp.float32)
    error = [
        float(jnp.square(qjax.dequantize(qjax.quantize(w, f)) - w).mean())
        for f in ("uint3_g16_bilevel2x16", NAMES[0], "uint3_g16_bilevel4x16", "uint3_g16_bilevel8x16", "uint3_g16_zf16")
    ]
    assert error[0] > error[1] > error[2] > error[3]
    assert error[3] == pytest.approx(error[4], rel=0.02)


def test_a_moved_grid_keeps_the_second_level(rng):
    fmt = bilevel()
    scales, _ = fmt.encode(jnp.asarray(rng.standard_normal((4, 256)), jnp.float32))
    s, m = fmt.columns(scales, (4, 256))
    moved = fmt.store(scales, (1.1 * s, 1.1 * m))
    for key in ("scale_low", "scale_step", "zero_low", "zero_step"):
        np.testing.assert_array_equal(moved[key], scales[key])
    assert float((fmt.columns(moved, (4, 256))[0] / s).mean()) == pytest.approx(1.1, abs=0.03)


def test_bad_input():
    with pytest.raises(UserError, match="a second level of 5 codes of 3 bits does not end on a byte"):
        parse("uint3_g16_bilevel3x5")
    with pytest.raises(UserError, match="2 to 8 bits, got 9"):
        parse("uint9_g16_bilevel3x16")
    with pytest.raises(UserError, match="256"):
        qjax.quantize(np.zeros((4, 128), np.float32), NAMES[0])
