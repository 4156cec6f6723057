"""Every family's block in pieces: the same numbers, one piece an input, and no equation run twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import TINY, tiny

from qjax.lifting import cut
from qjax.models.stages import stages_of
from qjax.pipeline.passes import groups_of

LENGTH = 12


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", TINY)
def test_the_pieces_of_a_block_are_the_block(name):
    config, params = tiny(name)
    stages = stages_of(config)
    for i in sorted({0, len(stages.blocks) - 1}):
        block, weights = stages.blocks[i], jax.tree.map(jnp.asarray, params[stages.names[i]])
        x = jnp.asarray(np.random.default_rng(0).standard_normal((3, LENGTH, config.dim)), jnp.float32)
        pieces = cut(block, weights, x)
        assert cut(block, weights, x[:1]) is pieces, "programs of them are compiled once"
        groups = groups_of(block, weights, x)
        assert [g for piece in pieces for g in piece.groups] == list(range(len(groups)))
        live, whole = (x,), np.asarray(block(weights, x))
        for piece in pieces:
            assert [(a.shape[1:], a.dtype) for a in live] == [(s.shape[1:], s.dtype) for s in piece.live]
            there = groups_of(piece.rest, weights, *live)
            for g, mine in zip(piece.groups, there, strict=False):
                assert [u.path for u in mine] == [u.path for u in groups[g]]
            np.testing.assert_allclose(np.asarray(piece.rest(weights, *live)), whole, atol=2e-5 * np.abs(whole).max())
            live = piece.step(weights, *live) if piece.step else live


def test_the_pieces_of_a_block_cost_what_it_costs():
    config, params = tiny("llama")
    block, weights = stages_of(config).blocks[0], params["layers_0"]
    x = jnp.zeros((2, 64, config.dim), jnp.float32)
    pieces = cut(block, weights, x)
    assert len(pieces) == 4, "q k v, o, gate and up, down"
    cost, live = 0.0, (x,)
    for piece in pieces:
        cost += flops(piece.step or piece.rest, weights, *live)
        live = piece.step(weights, *live) if piece.step else live
    assert cost < 1.05 * flops(block, weights, x)
    assert sum(a[0].size for a in live) <= (config.dim + config.hidden) * 64, "the residual stream and down's input"
