"""`roles`: every leaf of a tree is named as what it is to the function."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from lift_programs import TOKENS, decoder, kernel, normal

import qjax
from qjax.lifting import roles


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.LayerNorm()(nn.Embed(32, 64)(ids))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x)
        return nn.Dense(8)(x)


@pytest.fixture(scope="module")
def net():
    ids = jnp.ones((2, 5), jnp.int32)
    params = Net().init(jax.random.key(0), ids)["params"]
    params = params | {"step": jnp.int32(3), "spare": jnp.ones((64, 64))}
    return lambda p, ids: Net().apply({"params": {k: p[k] for k in p if k not in ("step", "spare")}}, ids), params, ids


def test_every_leaf_has_a_role(net):
    apply, params, ids = net
    table = roles(apply, params, ids)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert [r.path for r in table.rows] == [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves]
    found = {r.path: (r.role, r.primitives) for r in table.rows}
    attention = "MultiHeadDotProductAttention_0"
    assert found == {
        "Dense_0/bias": ("bias", ("add",)),
        "Dense_0/kernel": ("matrix", ("dot_general",)),
        "Embed_0/embedding": ("table", ("gather",)),
        "LayerNorm_0/bias": ("bias", ("add",)),
        "LayerNorm_0/scale": ("gain", ("mul",)),
        **{f"{attention}/{p}/bias": ("bias", ("add",)) for p in ("key", "out", "query", "value")},
        **{f"{attention}/{p}/kernel": ("matrix", ("dot_general",)) for p in ("key", "out", "query", "value")},
        "step": ("no floats", ()),
        "spare": ("unused", ()),
    }
    assert table[f"{attention}/out/kernel"].axes == (-3, -2)
    lines = str(table).splitlines()
    assert lines[0].split() == ["path", "shape", "role", "axes", "primitives", "note"] and len(lines) == len(leaves) + 1
    assert "<td" in table._repr_html_()


def test_a_tied_table_and_a_lost_weight():
    apply, params = decoder()
    assert roles(apply, params, TOKENS)["embed/embedding"].role == "table, matrix"
    lost = roles(lambda p, x: x @ p["w"] + jnp.sum(p["w"]), {"w": kernel(0, 64, 32)}, normal(1, 5, 64))["w"]
    assert (lost.role, lost.note) == ("matrix, other", "reduce_sum needs its values")
    assert lost.primitives == ("dot_general", "reduce_sum")


def test_quantize_params_says_what_it_rounded_that_is_no_matrix():
    params = {"w": normal(0, 64, 64), "position": normal(1, 32, 64), "old": normal(2, 64, 64)}
    x = normal(3, 32, 64)
    _, report = qjax.quantize_params(params, "Q8_0", apply=lambda p, x: (x + p["position"]) @ p["w"], inputs=(x,))
    assert report.notes == (
        "old: was rounded, and is no matrix to the function: unused (not read)",
        "position: was rounded, and is no matrix to the function: bias (add)",
    )
