"""Hadamard matrices of every order promised, and the transform against the dense product."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.reparam.hadamard import factors, hadamard, hadamard_matrix, largest_block, randomized, signs

MODULE = sys.modules["qjax.reparam.hadamard"]  # the package's own `hadamard` hides it

ORDERS = [1, 2, *range(4, 257, 4)]
QUIP_SHARP = [12, 20, 28, 36, 52, 60, 108, 116, 124, 140, 156, 172]
SIZES = [1, 2, 8, 128, 256, 2048, 12, 28, 48, 92, 172, 768, 1536, 11008, 14336, 28672]


def rows(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def dense_rows(n, at):
    """Rows of the orthonormal matrix in float64, from nothing but the two matrices of `factors`."""
    two, m = factors(n)
    left, right = hadamard_matrix(two).astype(np.float64), hadamard_matrix(m).astype(np.float64)
    return np.stack([np.kron(left[i // m], right[i % m]) for i in at]) / np.sqrt(n)


# the matrices


@pytest.mark.parametrize("n", [*ORDERS, 760, 924, 1024])
def test_hadamard_matrix(n):
    H = hadamard_matrix(n)
    assert H.shape == (n, n) and H.dtype == np.int8 and not H.flags.writeable
    assert np.all(np.abs(H) == 1)
    assert np.array_equal(H.astype(np.float64) @ H.T.astype(np.float64), n * np.eye(n))
    assert hadamard_matrix(n) is H


def test_every_order_up_to_256_is_there_and_the_first_ones_missing_are_known():
    assert set(QUIP_SHARP) <= set(ORDERS)
    missing = [n for n in range(4, 513, 4) if MODULE._construction(n) is None]
    assert missing == [260, 268, 292, 324, 356, 372, 404, 412, 428, 436, 452, 476, 508]


def test_every_construction_is_used():
    used = {MODULE._construction(n)[0] for n in range(4, 257, 4)}
    assert used == {"sylvester", "paley1", "paley2", "four", "kronecker"}


@pytest.mark.parametrize("q", [9, 25, 27, 49, 81, 121, 125, 243])
def test_residues_over_prime_powers(q):
    Q = MODULE._residues(q).astype(int)
    assert np.array_equal(Q, Q.T if q % 4 == 1 else -Q.T)
    assert np.array_equal(Q @ Q.T, q * np.eye(q, dtype=int) - 1)


@pytest.mark.parametrize(
    "n, message",
    [
        (260, r"order 260; block-diagonal ones always work: block=4 is"),
        (3, r"order 3; .* block=1 is"),
        (6, r"order 6; .* block=2 is"),
        (0, r"positive size, got 0"),
        (-4, r"positive size, got -4"),
        (8192, r"order 8192 is not written out, 4096 is the most"),
    ],
)
def test_orders_that_are_refused(n, message):
    with pytest.raises(UserError, match=message):
        hadamard_matrix(n)


# factors


@pytest.mark.parametrize(
    "n, expected",
    [
        (1, (1, 1)), (2, (2, 1)), (4096, (4096, 1)), (65536, (65536, 1)), (12, (1, 12)), (768, (64, 12)),
        (3072, (256, 12)), (14336, (512, 28)), (11008, (64, 172)), (28672, (1024, 28)), (18944, (128, 148)),
        (29568, (32, 924)), (1424, (1, 1424)),
    ],
)  # fmt: skip
def test_factors(n, expected):
    assert factors(n) == expected
    m = expected[1]
    smaller = [m >> j for j in range(1, 12) if m % (1 << j) == 0]
    assert not any(MODULE._construction(s) for s in smaller)


def test_factors_with_a_block():
    assert factors(13696, block=128) == (128, 1) and factors(768, block=1) == (1, 1)
    assert largest_block(13696) == 128 and largest_block(7) == 1 and largest_block(4096) == 4096


@pytest.mark.parametrize(
    "n, block, message",
    [
        (13696, None, r"order 13696; .*block=128 is the largest"),
        (6, None, r"order 6; .*block=2 is the largest"),
        (768, 12, r"block = 12 is no power of two that divides 768; the largest is 256"),
        (768, 512, r"block = 512 is no power of two that divides 768"),
        (768, 0, r"block = 0 is no power of two"),
    ],
)
def test_factors_that_are_refused(n, block, message):
    with pytest.raises(UserError, match=message):
        factors(n, block)
    with pytest.raises(UserError, match=message):
        hadamard(jnp.zeros((2, n)), block)
    with pytest.raises(UserError, match=message):
        randomized(jnp.zeros((2, n)), 0, block)


# the transform


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_the_dense_product(n):
    x = rows((3, n))
    y = np.asarray(hadamard(jnp.asarray(x)))
    at = np.arange(n) if n <= 768 else np.random.default_rng(1).choice(n, 64, replace=False)
    np.testing.assert_allclose(y[:, at], x.astype(np.float64) @ dense_rows(n, at).T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(hadamard(jnp.asarray(y), inverse=True), x, atol=1e-5)


@pytest.mark.parametrize("n, block", [(96, 8), (768, 256), (40, 1), (13696, 128)])
def test_block_diagonal(n, block):
    x = rows((2, n))
    H = np.kron(np.eye(n // block), hadamard_matrix(block)) / np.sqrt(block) if n < 1000 else None
    y = hadamard(jnp.asarray(x), block=block)
    if H is not None:
        np.testing.assert_allclose(y, x @ H.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
    np.testing.assert_allclose(hadamard(y, block=block, inverse=True), x, atol=1e-5)


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (2, 3, 5, 12)])
def test_leading_axes(shape):
    x = rows(shape)
    H = hadamard_matrix(12) / np.sqrt(12)
    np.testing.assert_allclose(hadamard(jnp.asarray(x)), x @ H.T, atol=1e-6)


@pytest.mark.parametrize("count", [1024, 1000, 999, 64])
def test_tiles_of_rows_change_nothing(count):
    n = 1536
    x = rows((count, n))
    assert (MODULE._tile(count, n) > 0) == (count == 1024)
    at = np.arange(0, n, 97)
    y = randomized(jnp.asarray(x), 3)
    flipped = x.astype(np.float64) * np.asarray(signs(3, n))
    np.testing.assert_allclose(np.asarray(y)[:, at], flipped @ dense_rows(n, at).T, atol=1e-5)
    np.testing.assert_allclose(randomized(y, 3, inverse=True), x, atol=1e-5)


def test_halves_are_computed_in_float32():
    x = jnp.asarray(rows((4, 768))).astype(jnp.bfloat16)
    y = hadamard(x)
    assert y.dtype == jnp.bfloat16
    assert jnp.array_equal(y, hadamard(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_integers_are_refused():
    with pytest.raises(UserError, match=r"x must be floating with at least one axis, got int32\[2, 4\]"):
        MODULE._checked(jnp.zeros((2, 4), jnp.int32), None)


# signs


def test_signs_come_from_seed_and_salt():
    a = np.asarray(signs(0, 4096))
    assert a.dtype == np.float32 and set(np.unique(a)) == {-1, 1} and abs(a.mean()) < 0.05
    assert np.array_equal(a, signs(0, 4096)) and np.array_equal(a, signs(jnp.uint32(0), 4096))
    for other in (signs(1, 4096), signs(0, 4096, salt=1)):
        assert abs((a * np.asarray(other)).mean()) < 0.05


def test_signs_are_those_of_files_written_before():
    assert np.asarray(signs(0, 12)).tolist() == [-1, 1, 1, 1, 1, -1, -1, 1, -1, 1, 1, -1]


# transformations of the program


def test_jit_vmap_and_grad():
    x, seeds = jnp.asarray(rows((3, 4, 96))), jnp.arange(3, dtype=jnp.uint32)
    expected = np.stack([randomized(a, int(s)) for a, s in zip(x, seeds, strict=True)])
    np.testing.assert_allclose(jax.vmap(randomized)(x, seeds), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(randomized))(x, seeds), expected, atol=1e-5)
    each = jax.vmap(lambda s: randomized(x[0], s))(seeds)
    np.testing.assert_allclose(each[2], randomized(x[0], 2), atol=1e-5)
    c = jnp.asarray(rows((4, 96), 1))
    gradient = jax.grad(lambda a: jnp.sum(randomized(a, 5) * c))(x[0])
    np.testing.assert_allclose(gradient, randomized(c, 5, inverse=True), atol=1e-5)


def test_vmap_and_grad_through_tiles():
    x, c = jnp.asarray(rows((2, 1024, 1024))), jnp.asarray(rows((1024, 1024), 1))
    assert 0 < MODULE._tile(1024, 1024) < 1024
    y = jax.vmap(randomized, (0, None))(x, 7)
    np.testing.assert_allclose(y[1], randomized(x[1], 7), atol=1e-5)
    gradient = jax.grad(lambda a: jnp.sum(randomized(a, 7) * c))(x[0])
    np.testing.assert_allclose(gradient, randomized(c, 7, inverse=True), atol=1e-5)


def test_the_second_call_compiles_nothing():
    x = jnp.asarray(rows((5, 96)))
    randomized(x, 0)
    before = MODULE._transform._cache_size()
    randomized(x + 1, 1, salt=3)
    assert MODULE._transform._cache_size() == before


def test_an_outlier_is_spread_over_all_channels():
    x = np.zeros((1, 14336), np.float32)
    x[0, 77] = 100.0
    y = np.asarray(randomized(jnp.asarray(x), 0))
    np.testing.assert_allclose(np.abs(y), 100 / np.sqrt(14336), rtol=1e-5)
