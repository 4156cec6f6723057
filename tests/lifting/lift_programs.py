"""What the tests of `qjax.lift` share: packed params and the comparison that every trial makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax.lifting import lift, report
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder

FORMAT = "int4_g32_f32"  # f32 scales, so that gradients by them can be compared tightly


def pack(w, axis=-2, format=FORMAT):
    return qjax.quantize(w, format, axis=axis)


CONFIG = DecoderConfig(vocab=48, dim=64, hidden=96, layers=2, heads=2, kv_heads=1, head_dim=32, tied=True)
TOKENS = jnp.array([[1, 5, 9, 2, 47], [0, 3, 3, 8, 1]], jnp.int32)


@functools.cache
def decoder(dtype=jnp.float32, **options):
    """(apply, params) of a tiny built-in decoder."""
    model = Decoder(dataclasses.replace(CONFIG, **options), dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.array(rng.normal(1 - min(1, s.ndim - 1), 0.1, s.shape), s.dtype), shapes)
    return lambda p, tokens: model.apply({"params": p}, tokens), params


def pack_decoder(params, format):
    """Kernels along `in`, the embedding along `dim`; vectors stay."""

    def leaf(path, w):
        return qjax.quantize(w, format, axis=-1 if "embed" in str(path) else 0) if w.ndim > 1 else w

    return jax.tree_util.tree_map_with_path(leaf, params)


def dense_params(params):
    return jax.tree.map(lambda w: qjax.dequantize(w) if qjax.is_qtensor(w) else w, params, is_leaf=qjax.is_qtensor)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def kernel(seed, n, *out):
    """A packed flax kernel [n, *out], quantized along n."""
    return pack(normal(seed, n, *out) / n**0.5, axis=-1 - len(out))


def stacked_kernel(seed, layers, n, out):
    return pack(normal(seed, layers, n, out) / n**0.5)


def plain_and_packed(fn, params, *args, **kwargs):
    """(what lift gives in strict mode, what dequantize-then-apply gives); no leaf is decoded on the way.

    Both jitted, which is quicker to compile than operation by operation; `eagerly` does not.
    """
    assert [use for use in report(fn, params, *args, **kwargs) if use.note] == []
    return jax.jit(lift(fn))(params, *args, **kwargs), jax.jit(fn)(dense_params(params), *args, **kwargs)


def eagerly(fn, params, *args, **kwargs):
    """The same outside jit."""
    assert [use for use in report(fn, params, *args, **kwargs) if use.note] == []
    return lift(fn)(params, *args, **kwargs), fn(dense_params(params), *args, **kwargs)


def assert_close(got, want, rtol=2e-5):
    """Equal trees: types exactly, values up to the order of summation."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dtype == jax.dtypes.float0:
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(b).max() > 0  # no comparison between zeros
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
