"""A small decoder, calibration windows of random tokens, and what each of its weights sees, by flax's own means."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import qjax
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.pipeline import Calibration
from qjax.plan import Plan, Rule

CONFIG = DecoderConfig(vocab=64, dim=64, hidden=64, layers=2, heads=4, kv_heads=4, head_dim=16, context=64)
"""All weights are 64 x 64, so that each rounding is compiled once."""
GROUPS = (("attn/q", "attn/k", "attn/v"), ("attn/o",), ("mlp/gate", "mlp/up"), ("mlp/down",))
"""The weights of a block in the order in which they are rounded; those of a group read the same input."""


def tiny_model(config=CONFIG, seed=0, **changes):
    """A decoder with lively random weights."""
    config = dataclasses.replace(config, **changes)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, s):
        kind = path[-1].key
        size = {"scale": 0.2, "embedding": 1.0}.get(kind, s.shape[-2] ** -0.5 if s.ndim > 1 else 1.0)
        return jnp.asarray((kind == "scale") + size * rng.standard_normal(s.shape), jnp.float32)

    return Model(config, jax.tree_util.tree_map_with_path(leaf, shapes))


def tiny_calibration(windows=8, context=24, heldout=2, vocab=CONFIG.vocab, batch=2, seed=0):
    tokens = np.random.default_rng(seed + 100).integers(0, vocab, (windows, context)).astype(np.int32)
    return Calibration(tokens, heldout, batch, seed)


def plan_of(*rules):
    """A plan of (pattern, format) pairs."""
    return Plan(tuple(Rule(pattern, fmt) for pattern, fmt in rules))


@partial(jax.jit, static_argnums=0)
def inputs_of(config, params, tokens):
    """{path: the input of each kernel, f32[windows, context, in]}."""
    seen = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            seen["/".join((*context.module.path, "kernel"))] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        Decoder(config).apply({"params": params}, tokens)
    return seen


def second_moment(x, y=None):
    """E[x y^T] over tokens, y = x unless given."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    y = x if y is None else np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    return jnp.asarray(x.T @ y / len(x), jnp.float32)


def get(params, path):
    for key in path.split("/"):
        params = params[key]
    return params


def put(params, path, leaf):
    """The tree with one leaf replaced."""
    key, _, rest = path.partition("/")
    return {**params, key: put(params[key], rest, leaf) if rest else leaf}


def dense(leaf):
    return qjax.dequantize(leaf) if qjax.is_qtensor(leaf) else leaf
