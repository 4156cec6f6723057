"""Which experts a token goes to, and with what shares: against a loop over tokens in numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.config import DecoderConfig
from qjax.models.mlp import routed

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
