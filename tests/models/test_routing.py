"""Which experts a token goes to, with what shares, and who is read: against a loop over tokens, and all experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.config import DecoderConfig
from qjax.models.mlp import Mixture, routed

PLAIN = DecoderConfig(vocab=8, dim=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, experts=6, experts_used=2)
KINDS = {
    "mixtral": {},
    "qwen2_moe": {"expert_norm": False},
    "deepseek_v2": {"expert_norm": False, "expert_scale": 1.5, "expert_groups": 3, "expert_groups_used": 1},
    "deepseek_v3": {
        "router": "sigmoid", "router_bias": True, "expert_scale": 2.5, "expert_groups": 2, "expert_groups_used": 1,
        "expert_group_best": 2,
    },
}  # fmt: skip


def by_hand(c, scores, bias):
    """{expert: share} of one token."""
    p = 1 / (1 + np.exp(-scores)) if c.router == "sigmoid" else np.exp(scores) / np.exp(scores).sum()
    rank, allowed = p + bias, set(range(c.experts))
    if c.expert_groups:
        groups = np.arange(c.experts).reshape(c.expert_groups, -1)
        good = [np.sort(rank[group])[::-1][: c.expert_group_best].sum() for group in groups]
        allowed = {int(e) for g in np.argsort(good)[::-1][: c.expert_groups_used] for e in groups[g]}
    chosen = sorted(allowed, key=lambda e: -rank[e])[: c.experts_used]
    total = sum(p[e] for e in chosen) if c.expert_norm else 1.0
    return {e: c.expert_scale * p[e] / total for e in chosen}


@pytest.mark.parametrize("kind", KINDS)
def test_choice_and_shares(kind):
    c = dataclasses.replace(PLAIN, **KINDS[kind])
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, c.experts))
    bias = rng.normal(size=c.experts) * c.router_bias
    chosen, share = routed(c, jnp.asarray(scores, jnp.float32), jnp.asarray(bias, jnp.float32))
    wanted = [by_hand(c, row, bias) for row in scores]
    for t, shares in enumerate(wanted):
        assert set(np.flatnonzero(chosen[t]).tolist()) == set(shares)
        np.testing.assert_allclose([share[t, e] for e in shares], list(shares.values()), rtol=1e-5)
        assert float(jnp.sum(share[t])) == pytest.approx(sum(shares.values()), rel=1e-5)
    changes = {"expert_groups": 0} if c.expert_groups else {"expert_norm": not c.expert_norm}
    other = routed(dataclasses.replace(c, **changes), jnp.asarray(scores, jnp.float32), jnp.asarray(bias, jnp.float32))
    assert float(jnp.abs(other[1] - share).max()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_may_be_used(kind):
    """Groups and all: what statistics of every token ask for."""
    c = dataclasses.replace(PLAIN, **KINDS[kind], experts_used=PLAIN.experts)
    assert bool(routed(c, jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32))[0].all())


SINGLE = {
    "mixtral": {},
    "deepseek": {"shared_hidden": 4, **KINDS["deepseek_v3"]},
    "gpt_oss": {"expert_bias": True, "activation": "clamped_swiglu"},
    "llama4": {"expert_inputs": True, "router": "sigmoid", "experts_used": 1},
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_position_by_itself_is_what_it_is_among_others(kind, rng):
    """By the matrices of its tokens' experts, where among others all experts' are multiplied with."""
    c = dataclasses.replace(PLAIN, expert_hidden=4, **SINGLE[kind])
    mixture, x = Mixture(c), jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32)
    params = mixture.init(jax.random.key(0), x)
    params = jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32), params)
    among, alone = mixture.apply(params, x), mixture.apply(params, x[:, 1:2])
    np.testing.assert_allclose(alone, among[:, 1:2], rtol=1e-4, atol=1e-5)


def test_a_position_by_itself_reads_no_other_experts():
    """One token of two experts among sixteen: a few percent of the work of all."""
    c = dataclasses.replace(PLAIN, dim=64, experts=16, expert_hidden=64)

    def flops(used):
        mixture, x = Mixture(dataclasses.replace(c, experts_used=used)), jnp.ones((1, 1, 64))
        params = jax.eval_shape(mixture.init, jax.random.key(0), x)
        return jax.jit(mixture.apply).lower(params, x).compile().cost_analysis()["flops"]

    assert flops(2) < 0.3 * flops(16)
