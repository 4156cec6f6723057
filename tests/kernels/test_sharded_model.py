"""A decoder spread over a mesh keeps its packed weights: each device multiplies with those it holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.lifting import lift
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder

CONFIG = DecoderConfig(vocab=64, dim=256, hidden=512, layers=1, heads=8, kv_heads=8, head_dim=32, context=16)
SUMMED = ("o", "down")  # contract what is spread; the others make it


def test_packed_weights_of_a_decoder_never_move():
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    model = Decoder(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def pack(path, w):
        return w if w.ndim < 2 else qjax.quantize(w, "Q4_0", axis=-1 if path[-1].key == "embedding" else 0)

    packed = jax.tree_util.tree_map_with_path(pack, params)

    def spread(path, leaf):
        names = {entry.key for entry in path if hasattr(entry, "key")}
        spec = P() if leaf.ndim < 2 or "embed" in names else P(None, "d") if names & set(SUMMED) else P("d")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    def apply(params, tokens):
        return model.apply({"params": params}, tokens)

    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab)
    there = jax.tree_util.tree_map_with_path(spread, packed)
    program = jax.jit(lift(apply)).lower(there, tokens).compile()
    found = re.findall(r"= (\w+)\[[\d,]*\]\S* (all-\w+|collective-\w+)", program.as_text())
    assert ("f32", "all-reduce") in found and not [kind for kind, _ in found if kind == "u8"]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(packed["layers_0"]["mlp"], is_leaf=qjax.is_qtensor))
    own = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(there["layers_0"]["mlp"]))
    assert own == whole / 8
    np.testing.assert_allclose(program(there, tokens), jax.jit(lift(apply))(packed, tokens), rtol=1e-3, atol=1e-3)
