"""AQLM's additive codes: beam search against all sums, books that get better, least squares against float64, bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

import qjax
from qjax.errors import UserError
from qjax.formats.tiles import bound
from qjax.formats.vectors.vector_kmeans import additive_kmeans, nearest_sums, summed


def normals(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("kind", ["squares", "weights", "metric"])
def test_a_beam_as_wide_as_the_book_finds_the_best_of_all_sums(kind):
    C, x, a = normals(0, 2, 8, 8), normals(1, 50, 8), normals(2, 32, 8)
    weight = jnp.exp(normals(3, 50, 8)) if kind == "weights" else None
    metric = a.T @ a if kind == "metric" else None
    sums = np.float64(C[0][:, None] + C[1][None]).reshape(64, 8)
    e = np.float64(x)[:, None] - sums[None]
    M = np.eye(8) if metric is None else np.float64(metric)
    v = np.ones((50, 8)) if weight is None else np.float64(weight)
    error = np.einsum("tsi,ij,tsj->ts", e, M, e) if kind == "metric" else (v[:, None] * e**2).sum(axis=2)
    for beam, exact in ((8, True), (1, False)):
        codes = np.asarray(nearest_sums(C, x, beam, weight, metric)).astype(int)
        found = error[np.arange(50), 8 * codes[:, 0] + codes[:, 1]]
        assert (found <= error.min(axis=1) * (1 + 1e-4) + 1e-4).all() == exact
        np.testing.assert_allclose(
            summed(C, jnp.asarray(codes, jnp.uint8)), sums[8 * codes[:, 0] + codes[:, 1]], rtol=1e-5
        )


def test_two_books_in_turns_are_below_one_behind_the_other():
    x, v = normals(0, 4096, 8), jnp.exp(normals(1, 4096, 8))

    @jax.jit
    def run(x, v):
        C = additive_kmeans(x, v, 2, 32, 8)
        first = additive_kmeans(x, v, 1, 32, 1)
        left = x - summed(first, nearest_sums(first, x, 1, v))
        second = additive_kmeans(left, v, 1, 32, 1)
        return (
            jnp.sum(v * (x - summed(C, nearest_sums(C, x, 8, v))) ** 2),
            jnp.sum(v * (left - summed(second, nearest_sums(second, left, 1, v))) ** 2),
        )

    together, residual = run(x, v)
    assert together < 0.95 * residual


def test_a_collapsed_start_is_repaired():
    """Half of the vectors are one vector, and so are half of the starts; few distinct ones are found exactly."""
    points = normals(0, 16, 8)
    at = np.random.default_rng(0).integers(16, size=400)
    at[::2] = 0
    x = points[at]
    C = additive_kmeans(x, jnp.ones_like(x), 1, 16, 1)
    np.testing.assert_allclose(summed(C, nearest_sums(C, x, 1)), x, atol=1e-5)


def test_normal_weights_at_two_bits_and_the_bits_of_a_file():
    """Below the best single levels (0.1175); the book is counted, a whole bit a weight in this matrix."""
    w = np.asarray(normals(0, 256, 256))
    q = qjax.quantize(w, "aqlm_2x8_g8")
    assert float(jnp.mean(jnp.square(w - qjax.dequantize(q)))) < 0.08
    raw = save({k: np.asarray(v) for k, v in q.leaves.items()})
    stored = 8 * (len(raw) - 8 - int.from_bytes(raw[:8], "little")) / w.size
    assert stored == q.bits_per_weight == 2 + 16 / 256 + 2 * 256 * 8 * 16 / 256**2 and q.format.bits_per_weight == 2
    assert qjax.dot(jnp.ones((2, 256)), q).shape == (2, 256)


def test_names_and_what_needs_the_books_at_hand():
    assert qjax.format("aqlm_3x5_g8").bits_per_weight == 15 / 8
    for name in ("aqlm_5x8_g8", "aqlm_2x9_g8", "aqlm_2x1_g8"):
        with pytest.raises(UserError, match="aqlm has 1 to 4 books of 2 to 8 bits"):
            qjax.format(name)
    fmt = qjax.format("aqlm_2x3_g8")
    scales, codes = fmt.encode(normals(0, 4, 64))
    with pytest.raises(TypeError, match=r"bound\(scales\)"):
        fmt.basis(codes)
    np.testing.assert_array_equal(scales["scale"] * bound(fmt, scales).basis(codes)[0], fmt.decode(scales, codes))


def test_a_vector_is_the_only_row_of_its_matrix_weights_and_all():
    fmt, w, v = qjax.format("aqlm_2x2_g8"), normals(0, 1, 256), jnp.exp(2 * normals(1, 1, 256))
    (scales, codes), (of_row, one) = fmt.encode(w, v), fmt.encode(w[0], v[0])
    assert all((scales[key][0] == of_row[key]).all() for key in scales)
    assert (codes[0] == one).all() and (one != fmt.nearest(of_row, w[0])).any()
