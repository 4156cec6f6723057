"""Inputs of kernels: parts add up, in every program, and bytes are the nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import products
import pytest

from qjax.kernels.inputs import PARTS, parts, rounded, unfit, whole


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_parts_are_bfloat16_and_their_sum_is_x(dtype, rng):
    x = jnp.asarray(rng.standard_normal((3, 64)) * np.exp(8 * rng.standard_normal((3, 1))), dtype)
    for run in (parts, jax.jit(parts)):
        made = run(x)
        assert made.dtype == jnp.bfloat16 and made.shape == (3 * PARTS[jnp.dtype(dtype)], 64)
        np.testing.assert_array_equal(whole(made.astype(jnp.float32), 3), x.astype(jnp.float32))
    assert unfit(dtype) == "" and unfit(jnp.int8) == "x is int8, not bfloat16, float16 or float32"


def test_bytes_are_the_nearest_of_their_row(rng):
    x = products.inputs(rng, 5, 64).at[2].set(0)
    q, a = rounded(x)
    error = np.abs(np.asarray(x, np.float64) - np.asarray(q, np.float64) * np.asarray(a, np.float64)[:, None])
    assert np.all(error <= np.asarray(a)[:, None] * 0.5001) and np.all(np.max(np.abs(q), axis=1)[[0, 1, 3, 4]] == 127)
    assert a[2] == 1 and not np.any(q[2])
