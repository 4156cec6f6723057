"""The Hadamard transform fused with rounding: in jax's interpreter, and compiled for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_ahead

from qjax.errors import UserError
from qjax.kernels.inputs import rounded
from qjax.kernels.mosaic_tpu.hadamard import rotated, twin
from qjax.reparam.hadamard import hadamard_matrix, randomized, signs


@pytest.mark.parametrize(
    "rows, n, last, dtype",
    [
        (3, 512, 128, jnp.bfloat16),
        (40, 1792, 896, jnp.float32),
        (1, 128, 128, jnp.float16),
        (5, 1536, 384, jnp.bfloat16),
    ],
)  # fmt: skip
def test_codes_are_those_of_the_transform(rows, n, last, dtype, rng):
    """Of the library's own: a code apart where y / a lies within a rounding of a half."""
    x = jnp.asarray(rng.standard_t(3, (rows, n)), dtype)
    s, L = signs(7, n), jnp.asarray(hadamard_matrix(last))
    want, scale = twin(x, s, L)
    if n & (n - 1) == 0:  # of other orders the library may take another matrix
        of_library = rounded(randomized(x.astype(jnp.float32), 7))[0]
        assert np.mean(np.asarray(of_library) != np.asarray(want)) < 1e-3
    H = np.kron(np.array(hadamard_matrix(n // last)), np.array(hadamard_matrix(last))) / np.sqrt(n)
    y = (np.asarray(x, np.float64) * np.asarray(s, np.float64)) @ H.T
    q, a = rotated(x, s, L, interpret=True)
    assert q.dtype == jnp.int8 and q.shape == x.shape and a.shape == (rows,)
    np.testing.assert_allclose(a, np.abs(y).max(1) / 127, rtol=1e-6)
    u = y / np.asarray(a, np.float64)[:, None]
    assert np.all(np.abs(np.asarray(q) - u) <= 0.5 + 1e-4)
    apart = np.asarray(q, np.int32) - np.asarray(want, np.int32)
    assert np.abs(apart).max() <= 1 and np.mean(apart != 0) < 1e-3
    np.testing.assert_allclose(scale, a, rtol=1e-6)


def test_rows_of_zeros_and_of_what_is_no_number_show_in_their_scales():
    x = jnp.zeros((2, 256)).at[1, 5].set(jnp.nan)
    q, a = rotated(x, jnp.ones(256), jnp.asarray(hadamard_matrix(128)), interpret=True)
    assert not np.any(np.asarray(q[0])) and a[0] == 1 and not np.isfinite(a[1])


def test_what_has_no_kernel_says_why(without_type_checks):
    H = jnp.asarray(hadamard_matrix(128))
    for n, factor in ((384, H), (64, jnp.asarray(hadamard_matrix(64)))):
        with pytest.raises(UserError, match=f"a transform of {n} needs a last factor that is a multiple of 128"):
            rotated(jnp.ones((1, n)), jnp.ones(n), factor)
    with pytest.raises(UserError, match="bytes of VMEM, of 16777216"):
        rotated(jnp.ones((1, 32768)), jnp.ones(32768), H)
    for transform in (rotated, twin):
        with pytest.raises(UserError, match=r"signs of shape \[1\] for x of 128 columns; expected \[128\]"):
            transform(jnp.ones((1, 128)), jnp.ones(1), H)
    with pytest.raises(UserError, match="x is int8"):
        rotated(jnp.ones((1, 128), jnp.int8), jnp.ones(128), H)


# Bundles of 32 rows, on v5e, v6e and tpu7x, as they stand.
BUNDLES = {(4096, 128): (839, 667, 596), (14336, 896): (7010, 3257, 2995)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", tpu_ahead.TOPOLOGIES)
@pytest.mark.parametrize("n, last", BUNDLES)
def test_compiled_for_a_tpu(n, last, kind):
    """No temporaries, and no more instructions than there were."""
    made, bundles = tpu_ahead.compiled(
        kind, rotated, *(jax.ShapeDtypeStruct(s, t) for s, t in (
            ((32, n), jnp.bfloat16), ((n,), jnp.bfloat16), ((last, last), jnp.bfloat16)
        )),
    )  # fmt: skip
    assert made.memory_analysis().temp_size_in_bytes <= 32 * 128 * 4  # the scales, a lane of which is read
    ((_, count),) = bundles.items()
    assert count <= 1.05 * BUNDLES[n, last][list(tpu_ahead.TOPOLOGIES).index(kind)]
