"""Experts beside an MLP: both read the stream, each between norms of its own, and so does the router (Gemma 4).

    y = n_2(MLP(n_1(x))) + n_4(sum_e r_e s_e MLP_e(n_3(x)))          r = routed(W_router n_0(x) / sqrt(dim))

n_0's gain and s, a number for each expert, are learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from qjax.models.config import DecoderConfig
from qjax.models.mlp import MLP, added, routed
from qjax.models.norm import RMSNorm


class Beside(nn.Module):
    """What both make of the stream."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general

    @nn.compact
    def __call__(self, x):
        c = self.config

        def norm(name, y, divisor=1.0):
            return RMSNorm(c.norm_eps, c.norm_offset, divisor, name=name)(y)

        def mlp(name, hidden, stacked=False):
            return MLP(c, hidden, stacked, self.dtype, self.dot_general, name=name)

        router = nn.Dense(c.experts, use_bias=False, name="router", dtype=self.dtype, dot_general=self.dot_general)
        chosen, share = routed(c, router(norm("router_norm", x, c.dim**0.5)))
        scale = self.param("expert_scale", nn.initializers.ones, (c.experts,), jnp.float32)
        share = share * scale[(None,) * (x.ndim - 1)]
        y = added(c, mlp("experts", c.expert_hidden, stacked=True), norm("experts_norm", x), chosen, share)
        shared = norm("shared_post_norm", mlp("shared", c.shared_hidden)(norm("shared_norm", x)))
        return shared + norm("experts_post_norm", y)
