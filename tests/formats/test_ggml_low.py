"""Signs, trits and four levels: ggml's bytes, and a scale that no other beats."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from against_ggml import errors, importance, tensors

import qjax
from qjax.formats import ggml_low
from qjax.formats.best_scale import best_scale

FORMATS = {f.name: f for f in ggml_low.FORMATS}
NAMES = tuple(FORMATS)
TERNARY = ("TQ1_0", "TQ2_0")


@pytest.mark.parametrize("name", NAMES)
def test_decodes_to_the_floats_of_ggml(name, ggml, rng):
    fmt = FORMATS[name]
    assert fmt.block_bytes * 2048 // fmt.block == ggml.lib.ggml_row_size(fmt.ggml_type, 2048)
    quantized = np.frombuffer(ggml.quantize(name, rng.standard_normal((4, 2048))), np.uint8)
    for raw in (quantized, np.frombuffer(qjax.to_bytes(qjax.quantize(rng.standard_normal((4, 2048)), name)), np.uint8)):
        q = qjax.from_bytes(name, raw, (4, 2048))
        want = ggml.dequantize(name, raw, (4, 2048))
        np.testing.assert_array_equal(np.asarray(qjax.dequantize(q)).view(np.uint32), want.view(np.uint32))
        np.testing.assert_array_equal(fmt.pack(*fmt.unpack(q.leaves))["blocks"], q.leaves["blocks"])
        if name in TERNARY:
            peer = gguf.quants.dequantize(raw.reshape(4, -1), gguf.GGMLQuantizationType[name])
            np.testing.assert_array_equal(peer, want)


@pytest.mark.parametrize("name", TERNARY)
def test_weights_that_are_ternary_have_ggmls_bytes(name, ggml, rng):
    w = (rng.integers(-1, 2, (8, 1024)) * rng.lognormal(0, 1, (8, 4, 1)).repeat(256, 1).reshape(8, 1024)).astype(
        np.float16
    )
    w = w.astype(np.float32)
    for weight in (None, importance(1024)):
        assert qjax.to_bytes(qjax.quantize(w, name, weight=weight)) == ggml.quantize(name, w)


@pytest.mark.parametrize("below, above", [(1, 1), (1, 2), (0, 0)])
def test_no_scale_is_better(below, above, rng):
    """Against a fine grid of scales of both signs, float64."""
    x, v = rng.standard_t(3, (24, 64)), rng.lognormal(0, 1, (24, 64))
    d = jax.jit(best_scale, static_argnums=(2, 3))(*(jnp.asarray(a, jnp.float32) for a in (x, v)), below, above)

    def error(d):
        u = x / d
        T = np.sign(u) if not above else np.clip(np.round(u), -below, above)
        return (v * (x - d * T) ** 2).sum(axis=1)

    top = np.abs(x).max(axis=1)[:, None] * 2
    grid = np.concatenate([np.linspace(1e-3, 1, 4000), -np.linspace(1e-3, 1, 4000)]) * top
    best = np.min([error(grid[:, i : i + 1]) for i in range(8000)], axis=0)
    ours = error(np.float64(d)[:, None])
    assert (ours <= best * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", NAMES)
def test_never_worse_than_ggml(name, ggml, rng):
    for kind, w in tensors(rng).items():
        for im in (None, importance(w.shape[-1])):
            ours, theirs = errors(ggml, name, w, im)
            assert ours <= theirs * (1 + 1e-6), kind
            if kind == "normal" and name != "Q1_0":
                assert ours < 0.75 * theirs
