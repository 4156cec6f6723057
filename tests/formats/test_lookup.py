"""Tables of levels that are learned: k-means near the best partition of all, its repairs, and the bits of a file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save

import qjax
from qjax.formats.kmeans import kmeans, lloyd, repaired, spread


def error(x, v, levels):
    return (np.float64(v) * np.abs(np.float64(x)[:, :, None] - np.float64(levels)[:, None, :]).min(axis=2) ** 2).sum(1)


def least(x, v, count):
    """The least weighted error of one row, by dynamic programming over sorted numbers: clusters are intervals."""
    order = np.argsort(x)
    x, v = np.float64(x)[order], np.float64(v)[order]
    n, cost = len(x), np.full((len(x) + 1, len(x) + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            mean = np.average(x[i:j], weights=v[i:j])
            cost[i, j] = (v[i:j] * (x[i:j] - mean) ** 2).sum()
    best = cost[0]
    for _ in range(count - 1):
        best = np.min(best[:, None] + cost, axis=0)
    return best[n]


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_t(4, (24, 64)).astype(np.float32), rng.lognormal(0, 1, (24, 64)).astype(np.float32)


def test_near_the_best_of_all_partitions(rows):
    x, v = rows
    for count in (4, 8):
        found = error(x, v, jax.jit(kmeans, static_argnums=2)(x, v, count))
        best = np.array([least(a, b, count) for a, b in zip(x, v, strict=True)])
        assert (found >= best * (1 - 1e-5)).all() and found.sum() < 1.3 * best.sum()


def test_no_step_and_no_repair_makes_the_error_larger(rows):
    x, v = rows

    @jax.jit
    def path(x, v):
        levels, seen = spread(x, v, 8), []
        levels = levels.at[:12, 3:].set(levels[:12, 3:4])  # collapsed: most of them are nobody's
        for _ in range(8):
            seen.append(levels)
            seen.append(repaired(x, v, levels))
            levels = lloyd(x, v, seen[-1])
        return jnp.stack([*seen, levels])

    errors = np.array([error(x, v, levels) for levels in path(x, v)])
    assert (errors[1:] <= errors[:-1] * (1 + 1e-6)).all()
    assert (errors[1, :12] < 0.9 * errors[0, :12]).all()  # the first repair, before any step
    assert errors[-1, :12].sum() < 0.2 * errors[0, :12].sum()


def test_a_row_of_few_numbers_is_exact():
    """Also where the start has two of them in one level, and where there are fewer numbers than levels."""
    rng = np.random.default_rng(1)
    points = rng.standard_normal((6, 8)) * np.geomspace(1e-2, 1, 8)
    w = np.float32(np.float16([rng.choice(p[:k], 64) for p, k in zip(points, (8, 8, 8, 5, 2, 1), strict=True)]))
    np.testing.assert_array_equal(qjax.dequantize(qjax.quantize(w, "lut3")), w)


@pytest.mark.parametrize("bits, mse", [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_normal_weights_lose_what_lloyd_and_max_found(bits, mse):
    w = np.random.default_rng(2).standard_normal((2, 32768)).astype(np.float32)
    w_hat = qjax.dequantize(qjax.quantize(w, f"lut{bits}"))
    assert float(jnp.mean(jnp.square(w - w_hat))) == pytest.approx(mse, rel=0.02)


def test_bits_are_those_of_a_saved_file():
    w = np.random.default_rng(3).standard_normal((8, 512)).astype(np.float32)
    q = qjax.quantize(w, "lut3")
    raw = save({k: np.asarray(v) for k, v in q.leaves.items()})
    header = int.from_bytes(raw[:8], "little")
    assert json.loads(raw[8 : 8 + header]).keys() == {"codes", "table"}
    assert (
        8 * (len(raw) - 8 - header) / w.size == q.bits_per_weight == 3 + 16 * 8 / 512 and q.format.bits_per_weight == 3
    )


def test_rows_that_do_not_end_on_a_byte_are_refused():
    with pytest.raises(qjax.errors.UserError, match="a row of 12 codes of 3 bits does not end on a byte"):
        qjax.quantize(np.ones((2, 12), np.float32), "lut3")
