"""The declared graph: its edges are the decoder's."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import TINY, tiny, tiny_tokens

from qjax.models.config import DecoderConfig
from qjax.models.families import weight_names
from qjax.models.graph import edges
from qjax.models.model import forward

MHA = DecoderConfig(vocab=31, dim=8, hidden=12, layers=2, heads=4, kv_heads=4, head_dim=6, qkv_bias=True)
GQA = dataclasses.replace(MHA, kv_heads=2)


@pytest.mark.parametrize("name", TINY)
def test_every_edge_names_weights_of_its_size(name):
    config, _ = tiny(name)
    shapes = {"/".join(w.path): w.shape for w in weight_names(config)}
    found = edges(config)
    assert len({e.name for e in found}) == len(found)
    for edge in found:
        assert shapes[edge.source][-1] == edge.channels
        assert {shapes[sink][-2] for sink in edge.sinks} == {edge.channels}
        assert edge.bias is None or shapes[edge.bias] == (edge.channels,)
        assert edge.is_norm == (len(shapes[edge.source]) == 1)
        assert edge.offset == (config.norm_offset if edge.is_norm else 0)


@pytest.mark.parametrize("name", TINY)
def test_every_kernel_has_one_edge_but_o_of_grouped_queries(name):
    """And but those that read a part of a fused weight, or the residual stream itself."""
    config, _ = tiny(name)
    kernels = {"/".join(w.path) for w in weight_names(config) if w.path[-1] == "kernel"}
    sinks = [sink for edge in edges(config) for sink in edge.sinks]
    assert len(sinks) == len(set(sinks))
    alone = {"attn/o"} if config.kv_heads < config.heads or config.fused_qkv else set()
    alone |= {"mlp/down"} if config.fused_mlp else set()
    alone |= {"attn/o"} if config.kv_rank else set()
    alone |= {"mlp/experts/down"}  # each expert has channels of its own
    alone |= {"linear_attn/o"}  # one norm's gain is that of all heads
    alone |= set() if config.pre_norms else {"attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"}
    lonely = {f"layers_{i}/{part}/kernel" for i in range(config.layers) for part in alone}
    assert kernels - set(sinks) == lonely & kernels


def test_the_list_of_a_config():
    names = [e.name for e in edges(dataclasses.replace(MHA, layers=1))]
    assert names == [
        "layers_0/attn_norm -> q, k, v",
        "layers_0/v -> o",
        "layers_0/mlp_norm -> gate, up",
        "layers_0/up -> down",
        "final_norm -> head",
    ]
    assert [e.bias for e in edges(MHA) if e.bias] == ["layers_0/attn/v/bias", "layers_1/attn/v/bias"]
    assert not any("o" in e.name.split() for e in edges(GQA))
    assert edges(dataclasses.replace(MHA, tied=True)) == edges(MHA)[:-1]


ALONE = ["llama-mha", "qwen2", "gemma2", "qwen3", "phi3", "qwen2_moe", "deepseek_v3", "gemma4", "qwen3_5"]


@pytest.mark.parametrize("name", ALONE)
def test_only_the_sinks_read_the_source(name):
    """With its sinks at zero, what a source holds no longer reaches the logits: no consumer is missing in an edge."""
    config, params = tiny(name)
    tokens = tiny_tokens(config)

    def leaf(tree, path):
        *parents, last = path.split("/")
        for part in parents:
            tree = tree[part]
        return tree, last

    for edge in edges(config):
        made = []
        for factor in (1.0, 3.0):
            tree = {k: v if not isinstance(v, dict) else _copy(v) for k, v in params.items()}
            for sink in edge.sinks:
                node, last = leaf(tree, sink)
                node[last] = jnp.zeros_like(node[last])
            node, last = leaf(tree, edge.source)
            node[last] = node[last] * factor
            made.append(np.asarray(forward(config, tree, tokens)))
        np.testing.assert_array_equal(made[0], made[1])


def _copy(tree):
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in tree.items()}
