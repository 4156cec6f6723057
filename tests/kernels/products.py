"""What tests of kernels share: random packed weights, the exact product, and how far rounding may lead from it."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import qjax
from qjax.formats import format
from qjax.kernels.layouts.coding import coding

UNIT = 2.0**-24  # half a unit in the last place of 1, float32


def weights(rng, name, rows, columns):
    """A format and the leaves of random weights that have outliers and rows of many sizes."""
    w = rng.standard_t(4, (rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    return format(name), qjax.quantize(jnp.asarray(w, jnp.float32), name).leaves


def inputs(rng, batch, columns):
    return jnp.asarray(rng.standard_normal((batch, columns)) + 0.5, jnp.bfloat16)


def exact(rng, batch, columns):
    """float32 inputs that no bfloat16 are."""
    return jnp.asarray(rng.standard_normal((batch, columns)) + 0.5, jnp.float32)


def product(x, fmt, leaves):
    """y in float64 and the sum of its terms' magnitudes: f64[batch, rows] each.

    w = s (T' + c) + m, with the levels T' of a table as bfloat16.
    """
    code = coding(fmt)
    scales, codes = fmt.unpack(leaves)
    s, m = (None if a is None else np.asarray(a, np.float64) for a in fmt.columns(scales, codes.shape))
    T = np.asarray(code.values(code.stored(codes))).astype(ml_dtypes.bfloat16).astype(np.float64)
    per = codes.shape[-1] // s.shape[-1]
    s = np.repeat(s, per, axis=-1)
    offset = s * code.center + (0 if m is None else np.repeat(m, per, axis=-1))
    x = np.asarray(x, np.float64)
    return x @ (s * T + offset).T, np.abs(x) @ (np.abs(s * T) + np.abs(offset)).T


def assert_rounded_sums(y, x, fmt, leaves):
    """y is the exact product but for the rounding of a sum of K float32 terms, in any order: K u sum |terms|."""
    expected, size = product(x, fmt, leaves)
    assert y.shape == expected.shape and y.dtype == np.float32
    within = (x.shape[1] + 4) * UNIT * size
    worst = np.max(np.abs(np.asarray(y, np.float64) - expected) / within)
    assert worst < 1, f"{fmt.name}: {worst:.1f} times the rounding of its sums"
