"""Whole nnx States: keys of random numbers and integers among the weights pass through."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from lift_programs import assert_close

import qjax
from qjax.lifting import lift, report


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 64, rngs=rngs)
        self.linear = nnx.Linear(64, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.table = nnx.Variable(jnp.arange(64).reshape(2, 32))

    def __call__(self, ids):
        return self.dropout(self.linear(self.embed(ids))) + self.table[...][1].astype(jnp.float32)[None]


def test_a_state_with_keys_and_integers_is_quantized_and_runs():
    graph, state = nnx.split(Net(nnx.Rngs(0)))
    ids = jnp.array([3, 1, 4])

    def apply(state, ids):
        return nnx.merge(graph, state)(ids)

    packed, made = qjax.quantize_params(state, "Q8_0")
    kept = {line.name: (line.format, line.kept) for line in made.tensors if line.kept}
    assert kept == {
        "dropout/rngs/count/value": ("uint32", "no floats"),
        "dropout/rngs/key/value": ("key<fry>", "no floats"),
        "linear/bias/value": ("float32", "a vector"),
        "table/value": ("int32", "no floats"),
    }
    assert packed["embed"]["embedding"].get_raw_value().axis == -1  # rows are looked up
    assert {use.path for use in report(apply, packed, ids)} == {
        "embed/embedding/value", "linear/kernel/value", "linear/bias/value",
    }  # fmt: skip
    dense = jax.tree.map(lambda w: qjax.dequantize(w) if qjax.is_qtensor(w) else w, packed, is_leaf=qjax.is_qtensor)
    assert_close(lift(apply)(packed, ids), apply(dense, ids))
    lines = str(qjax.describe(packed, state)).splitlines()
    assert any(line.split()[:2] == ["dropout/rngs/key/value", "key<fry>"] for line in lines)
    assert set(qjax.observe(apply, state, [ids])) == {"linear/kernel/value"}
    assert np.isfinite(np.asarray(lift(apply)(packed, ids))).all()
