"""Weights to compare with ggml on, and both errors."""

import jax.numpy as jnp
import numpy as np

import qjax


def tensors(rng):
    """What weights look like, and what they should not look like."""
    normal = rng.standard_normal((24, 1024))
    outlier = normal.copy()
    outlier[:, ::100] *= 50
    sparse = normal * (rng.random(normal.shape) < 0.1)
    half = normal[:8].copy()
    half[:, :512] = 0
    return {
        "normal": normal,
        "laplace": rng.laplace(size=(16, 1024)),
        "student3": rng.standard_t(3, size=(16, 1024)),
        "student1.5": rng.standard_t(1.5, size=(16, 1024)),
        "positive": np.abs(normal),
        "negative": -np.abs(normal),
        "uniform": rng.uniform(-1, 1, (16, 1024)),
        "outlier": outlier,
        "sparse": sparse,
        "half zero": half,
        "1e4": normal * 1e4,
        "1e-6": normal * 1e-6,
        "constant": np.full((4, 512), 0.37),
        "negative constant": np.full((4, 512), -0.37),
        "ramp": np.linspace(-1, 1, 2048).reshape(2, 1024),
        "zero": np.zeros((2, 512)),
    }


def importance(n):
    return np.random.default_rng(9).lognormal(0, 1, n).astype(np.float32)


def errors(ggml, name, w, im):
    """Our squared error, weighed by the importance, and ggml's."""
    w = np.ascontiguousarray(w, np.float32)
    weigh = np.ones(w.shape[-1]) if im is None else im.astype(np.float64)
    ours = qjax.to_bytes(qjax.quantize(w, name, weight=None if im is None else jnp.asarray(im)))
    theirs = ggml.quantize(name, w, im)
    both = (ggml.dequantize(name, raw, w.shape).astype(np.float64) for raw in (ours, theirs))
    return [float((weigh * (w - w_hat) ** 2).sum()) for w_hat in both]
