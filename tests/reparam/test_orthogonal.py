"""Random orthogonal matrices: that they are, that they are Haar, and that what they do can be undone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.reparam.orthogonal import _key, _kronecker, _shuffled, dense, kronecker, orthogonal


def rows(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("n", [1, 7, 64])
def test_orthogonal(n):
    Q = np.asarray(orthogonal(3, n))
    assert Q.dtype == np.float32
    np.testing.assert_allclose(Q @ Q.T, np.eye(n), atol=1e-5)
    assert np.array_equal(Q, orthogonal(jnp.uint32(3), n))
    if n > 2:
        assert not np.allclose(Q, orthogonal(4, n), atol=0.1)
        assert not np.allclose(Q, orthogonal(3, n, salt=1), atol=0.1)


def test_orthogonal_is_haar():
    """Diaconis and Shahshahani 1994: of Haar's matrices, E tr Q = 0, E (tr Q)^2 = 1, E tr Q^2 = 1; QR alone has not."""
    Q = np.asarray(jax.vmap(lambda seed: orthogonal(seed, 4))(jnp.arange(20000)))
    trace = np.trace(Q, axis1=1, axis2=2)
    assert abs(trace.mean()) < 0.03 and abs((trace**2).mean() - 1) < 0.05
    assert abs(np.trace(Q @ Q, axis1=1, axis2=2).mean() - 1) < 0.05
    assert np.abs(Q.mean(0)).max() < 0.02


@pytest.mark.parametrize("transform", [dense, kronecker])
@pytest.mark.parametrize("n", [96, 1])
def test_rotations(transform, n):
    x = rows((2, 3, n))
    y = transform(x, 5)
    matrix = np.asarray(transform(jnp.eye(n), 5)).T  # of x -> x matrix^T
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(y, np.asarray(x) @ matrix.T, atol=1e-5)
    np.testing.assert_allclose(transform(y, 5, inverse=True), x, atol=1e-5)
    np.testing.assert_allclose(transform(transform(x, 5, inverse=True), 5), x, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    if n > 1:
        assert not np.allclose(y, transform(x, 6), atol=0.1) and not np.allclose(y, transform(x, 5, salt=1), atol=0.1)


def test_dense_is_its_matrix():
    x = rows((3, 24))
    np.testing.assert_allclose(dense(x, 1, salt=2), np.asarray(x) @ np.asarray(orthogonal(1, 24, 2)).T, atol=1e-5)


def order_of(seed, n):
    return _shuffled(jax.random.split(_key(seed, 0), 3)[2], n)


@pytest.mark.parametrize("n, p", [(96, 8), (22, 2)])
def test_kronecker_is_a_product_behind_a_permutation(n, p):
    matrix = np.asarray(kronecker(jnp.eye(n), 0)).T  # (U (x) V) P
    order = np.asarray(order_of(0, n))
    product = matrix[:, order].reshape(p, n // p, p, n // p).transpose(0, 2, 1, 3).reshape(p * p, -1)
    left, values, right = np.linalg.svd(product)
    np.testing.assert_allclose(values[0], math.sqrt(n), rtol=1e-5)
    assert values[1] < 1e-4  # rank 1 once its entries are rearranged: a Kronecker product
    U, V = left[:, 0].reshape(p, p) * math.sqrt(p), right[0].reshape(n // p, n // p) * math.sqrt(n // p)
    np.testing.assert_allclose(U @ U.T, np.eye(p), atol=1e-5)
    np.testing.assert_allclose(V @ V.T, np.eye(n // p), atol=1e-5)
    assert not np.array_equal(order, np.arange(n))


@pytest.mark.parametrize("transform", [dense, kronecker])
def test_jit_vmap_and_grad(transform):
    x, seeds = rows((3, 4, 24)), jnp.arange(3, dtype=jnp.uint32)
    expected = np.stack([transform(a, int(s)) for a, s in zip(x, seeds, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(transform))(x, seeds), expected, atol=1e-5)
    c = rows((4, 24), 1)
    gradient = jax.grad(lambda a: jnp.sum(transform(a, 5) * c))(x[0])
    np.testing.assert_allclose(gradient, transform(c, 5, inverse=True), atol=1e-5)


def test_the_second_call_compiles_nothing():
    kronecker(rows((5, 12)), 0)
    before = _kronecker._cache_size()
    kronecker(rows((5, 12), 1), 1, salt=3)
    assert _kronecker._cache_size() == before


@pytest.mark.parametrize("transform", [dense, kronecker])
def test_halves_keep_their_dtype(transform):
    x = rows((2, 24)).astype(jnp.bfloat16)
    assert transform(x, 0).dtype == jnp.bfloat16 == transform(x, 0, inverse=True).dtype


def test_primes_are_refused():
    with pytest.raises(UserError, match=r"kronecker: n = 127 is a prime .* use hadamard with block=, or dense"):
        kronecker(rows((2, 127)), 0)


@pytest.mark.parametrize("transform", [dense, kronecker])
def test_nothing_to_rotate(transform):
    with pytest.raises(UserError, match=r"a last axis to rotate, got float32\[2, 0\]"):
        transform(jnp.zeros((2, 0)), 0)
    with pytest.raises(UserError, match="n must be at least 1, got 0"):
        orthogonal(0, 0)
