"""What figures are drawn from: bins of weights, KL by token, tensors by layer."""

import numpy as np
import pytest

from qjax.evaluate.histograms import grid_histogram, grid_positions, middle_histograms, weight_histogram
from qjax.evaluate.perplexity import Windows
from qjax.evaluate.sizes import TensorRow, by_layer
from qjax.evaluate.tokens import kl_quantiles, worst_tokens
from qjax.tensor import dequantize, quantize


def test_bins_hold_every_weight(rng):
    w = rng.normal(size=(64, 64)).astype(np.float32)
    rows = weight_histogram(w, np.round(w))
    middles = np.array([row["weight"] for row in rows])
    assert len(rows) < 64 and 0 in middles and np.allclose(middles, -middles[::-1])
    for key in ("before", "after"):
        assert sum(row[key] for row in rows) == pytest.approx(1, abs=1e-4)
    near = middles[[row["after"] > 0 for row in rows]]
    assert all(np.abs(near - np.round(near)).min() < 0.06 for near in near if abs(near) < 3), "whole numbers alone"
    zero = next(row for row in rows if row["weight"] == 0)
    width = middles[1] - middles[0]
    assert zero["before"] == pytest.approx(np.mean(np.abs(w) < width / 2), abs=1e-5)
    assert zero["after"] == pytest.approx(np.mean(np.abs(w) < 0.5), abs=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "MXFP4", "Q4_K", "IQ4_NL", "NF4_dq", "uint4_g64", "int3_g64"])
def test_levels_lie_where_the_weights_went(rng, name):
    """On its block's grid every decoded weight is one of the levels."""
    q = quantize(rng.normal(size=(4, 512)).astype(np.float32), name)
    place, levels = grid_positions(q, np.asarray(dequantize(q)).ravel())
    distance = np.abs(place[:, None] - levels[None, :]).min(axis=1)
    assert distance.max() < 2e-3
    assert (np.diff(levels) > 0).all() and (levels[0], levels[-1]) == (0.0, 1.0)


def test_levels_are_the_middles_of_bins(rng):
    w = rng.normal(size=(512, 4)).astype(np.float32)
    rows = grid_histogram(w, quantize(w, "uint3_g64", axis=0))
    full = [row["position"] for row in rows if row["after"] > 0]
    assert full == pytest.approx([n / 7 for n in range(8)], abs=1e-4) and len(rows) == 56
    assert all(row["before"] > 0 for row in rows if 0.2 < row["position"] < 0.8)
    assert grid_histogram(w, quantize(w, "Q8_0", axis=0)) == []


def test_the_middle_of_a_kind_of_weight_stands_for_it(rng):
    params = {f"layers_{n}": {"up": rng.normal(size=(32, 4)).astype(np.float32)} for n in range(3)}
    params["layers_0"]["down"] = params["layers_0"]["up"]
    packed = {name: {key: quantize(w, "Q4_0", axis=0) for key, w in layer.items()} for name, layer in params.items()}
    found = middle_histograms(params, packed, "up")
    assert {row["of"] for rows in found.values() for row in rows} == {"layers_1/up in Q4_0"} and len(found) == 2
    bins = weight_histogram(params["layers_1"]["up"], dequantize(packed["layers_1"]["up"]))
    assert [{k: v for k, v in row.items() if k != "of"} for row in found["weights"]] == bins
    assert middle_histograms(params, params, "up")["grid"] == [] and middle_histograms(params, params, "gate") == {}


def test_quantiles_reach_as_far_as_tokens_do():
    kl = np.arange(1, 1001, dtype=np.float32).reshape(10, 100)
    rows = kl_quantiles(kl)
    assert rows[0] == {"quantile": 0.108749, "kl": 109.6} and 0.99 < rows[-1]["quantile"] <= 0.999
    for row in rows:
        assert np.mean(kl <= row["kl"] + 1) >= row["quantile"]


def test_the_worst_tokens_stand_in_their_text():
    tokens = np.array([[0, 1, 2, 3, 4, 5], [0, 6, 7, 8, 9, 1]], np.int32)
    kl = np.array([[0.1, 0.2], [3.0, 0.3]], np.float32)  # of positions 4 and 5
    rows = worst_tokens(kl, Windows(tokens, 3, "llama.cpp"), lambda ids: "".join("abcdefg\nij"[i] for i in ids), 2)
    assert rows == [
        {"before": "ag↵i", "token": "j", "after": "b", "kl": 3.0},
        {"before": "ag↵ij", "token": "b", "after": "", "kl": 0.3},
    ]


def test_tensors_know_their_layer():
    rows = by_layer([
        TensorRow("layers_11/mlp/up/kernel", "Q4_0", (8, 32), 4.5, 144, 0.0812345),
        TensorRow("embed/embedding", "Q8_0", (9, 32), 8.5, 306),
    ])  # fmt: skip
    assert [(row["layer"], row["kind"], row["relative_rmse"]) for row in rows] == [
        (11, "mlp up", 0.08123),
        (None, "embed", None),
    ]
    assert rows[0]["shape"] == "8 x 32" and rows[1]["bytes"] == 306
