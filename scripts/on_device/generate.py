"""Tokens a second from packed weights and dense ones: `qjax bench generate`, a few layers of Llama 8B's shapes."""

import jax
import jax.numpy as jnp

import qjax
from qjax.bench.texts import Texts, contest
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model


def measure(dry: bool) -> dict:
    shape = {"vocab": 32000, "dim": 4096, "hidden": 14336, "layers": 4, "heads": 32, "kv_heads": 8, "head_dim": 128}
    if dry:
        shape = {"vocab": 64, "dim": 128, "hidden": 256, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 64}
    config = DecoderConfig(**shape, context=256)
    dtype = "float32" if dry else "bfloat16"
    rows = list(contest(packed(config), Texts(tokens=8 if dry else 32, rounds=1 if dry else 3, dtype=dtype)))
    lines = [f"{r['name']}: {r['tokens_per_second']:.1f} tokens/s, {r['weight_bytes'] / 1e9:.2f} GB" for r in rows]
    return {"ok": True, "lines": lines, "rows": rows}


def packed(config: DecoderConfig) -> Model:
    """Random weights, the matrices of blocks in int4 under groups of 128."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    def leaf(path, s):
        if s.ndim < 2:
            return jnp.ones(s.shape, s.dtype)
        w = jax.random.normal(jax.random.key(s.size), s.shape) * s.shape[0] ** -0.5
        return qjax.quantize(w, "int4_g128", axis=-2) if path[0].key.startswith("layers_") else w

    return Model(config, jax.tree_util.tree_map_with_path(leaf, shapes))
