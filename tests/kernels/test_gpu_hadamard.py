"""The GPU's Hadamard transform fused with rounding: in jax's interpreter, and compiled for an H100."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.kernels.mosaic_gpu.hadamard import rotated
from qjax.reparam.hadamard import hadamard_matrix, signs


@pytest.mark.parametrize("rows, last, dtype", [(3, 16, jnp.bfloat16), (2, 48, jnp.float32), (1, 32, jnp.float16)])
def test_codes_are_those_of_the_transform(rows, last, dtype, rng):
    n = 64 * last
    x, s = jnp.asarray(rng.standard_t(3, (rows, n)), dtype), signs(7, n)
    q, a = rotated(x, s, jnp.asarray(hadamard_matrix(last)), interpret=True)
    assert_codes(q, a, x, s)


def assert_codes(q, a, x, s):
    """In float64: a code is the nearest but where rounding of sums decides."""
    n = x.shape[1]
    H = np.kron(np.array(hadamard_matrix(64)), np.array(hadamard_matrix(n // 64))) / np.sqrt(n)
    y = (np.asarray(x, np.float64) * np.asarray(s, np.float64)) @ H.T
    assert q.dtype == jnp.int8 and q.shape == x.shape
    np.testing.assert_allclose(a, np.abs(y).max(1) / 127, rtol=1e-6)
    assert np.all(np.abs(np.asarray(q) - y / np.asarray(a, np.float64)[:, None]) <= 0.5 + 1e-4)


def test_rows_of_zeros_and_of_what_is_no_number_show_in_their_scales():
    x = jnp.zeros((2, 1024)).at[1, 5].set(jnp.nan)
    q, a = rotated(x, jnp.ones(1024), jnp.asarray(hadamard_matrix(16)), interpret=True)
    assert not np.any(np.asarray(q[0])) and a[0] == 1 and not np.isfinite(a[1])


def test_what_has_no_kernel_says_why(without_type_checks):
    H = jnp.asarray(hadamard_matrix(16))
    with pytest.raises(
        UserError, match="a transform of 2048 is 64 times a last factor of 32, a multiple of 16 up to 128"
    ):
        rotated(jnp.ones((1, 2048)), jnp.ones(2048), H)
    for signs_of in (1, 512):  # one would be broadcast
        with pytest.raises(UserError, match=r"signs of shape .* for x of 1024 columns; expected \[1024\]"):
            rotated(jnp.ones((1, 1024)), jnp.ones(signs_of), H)
    with pytest.raises(UserError, match="x is int8"):
        rotated(jnp.ones((1, 1024), jnp.int8), jnp.ones(1024), H)


REGISTERS = {(64, jnp.bfloat16): 128, (128, jnp.bfloat16): 232, (112, jnp.float32): 204}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("last, dtype", REGISTERS)
def test_compiled_for_an_h100(last, dtype, h100):
    n = 64 * last
    shapes = ((8, n), dtype), ((n,), jnp.float32), ((last, last), jnp.bfloat16)
    made = h100(rotated, *(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    assert not made.spilled and made.registers <= REGISTERS[last, dtype]
