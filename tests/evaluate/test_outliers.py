"""Outliers by channel: the numbers are those of the changed layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.evaluate.outliers import outliers, peaks
from qjax.reparam import hadamard, smooth


def test_outliers():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 64)).astype(np.float32)
    x[:, 5] *= 30
    w = jnp.asarray(rng.standard_normal((32, 64)), jnp.float32)
    found = outliers(w, jnp.asarray(x), {"as it is": (), "smooth": (smooth(),), "rotated": (hadamard("in"),)})
    plain = found["as it is"]
    np.testing.assert_allclose(plain["inputs"], np.abs(x).max(0), rtol=1e-6)
    assert plain["input_peak"] == pytest.approx(np.abs(x).max() / np.median(np.abs(x).max(0)), rel=1e-5)
    z = np.float64(x) - np.float64(x).mean()
    assert plain["input_kurtosis"] == pytest.approx(np.mean(z**4) / np.mean(z**2) ** 2, rel=1e-4)
    assert found["rotated"]["input_peak"] < 0.2 * plain["input_peak"]
    assert found["smooth"]["input_peak"] < 0.5 * plain["input_peak"] < plain["input_peak"]
    assert found["smooth"]["weight_peak"] > plain["weight_peak"]  # it moved there
    np.testing.assert_array_equal(plain["w"], w)
    map = peaks(plain["inputs"], 16)
    assert len(map) == 16 and map[1] == pytest.approx(plain["input_peak"], rel=1e-3) == max(map), (
        "channel 5 of 4 a group"
    )
    assert len(peaks(np.ones(3, np.float32))) == 3
