"""Logs become a small table: means over an arm's runs, few rows, and of learned scales how far they moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.training.grid import weights
from qjax.training.grid.quantizer import Quantizer
from qjax.training.run.curve import curve, thinned


def test_arms_are_means_over_their_runs():
    logs = {
        "a": [
            [{"step": 10, "loss": 3.0, "rate": 1.0}, {"step": 20, "loss": 2.0, "heldout": 2.5}],
            [{"step": 10, "loss": 4.0}, {"step": 20, "loss": 2.5, "heldout": 3.5}, {"step": 30, "loss": 1.0}],
        ],
        "b": [[{"step": 10, "loss": 5.0, "scale_drift": 0.5}]],
        "without a log": [],
    }
    assert curve(logs) == [
        {"arm": "a", "step": 10, "loss": 3.5},
        {"arm": "a", "step": 20, "loss": 2.25, "heldout": 3.0},
        {"arm": "b", "step": 10, "loss": 5.0, "scale_drift": 0.5},
    ]


def test_a_long_log_is_thinned():
    kept = thinned(list(range(1001)), 11)
    assert kept == list(range(0, 1001, 100)) and thinned([1, 2], 11) == [1, 2]
    long = [{"step": n, "loss": float(n)} for n in range(5000)]
    assert len(curve({"a": [long]})) == 200 and curve({"a": [long]})[-1]["step"] == 4999


def test_drift_is_how_far_learned_scales_moved():
    params = {"w": jax.random.normal(jax.random.key(0), (4, 64))}
    quantizers = {"w": Quantizer(qjax.format("int4_g32"), scales="learned")}
    trained, constants = weights.init(params, quantizers)
    drift = lambda trained: float(weights.statistics(params, quantizers, trained, constants)[0]["scale_drift"])  # noqa: E731
    assert drift(trained) == 0.0
    moved = jax.tree.map(lambda x: x + jnp.float32(np.log(2.0)), trained)
    assert drift(moved) == pytest.approx(np.log(2.0), rel=1e-6)
    frozen = {"w": Quantizer(qjax.format("int4_g32"), scales="frozen")}
    assert "scale_drift" not in weights.statistics(params, frozen, *weights.init(params, frozen))[0]
