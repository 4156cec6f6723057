"""The feed-forward half of a layer: one gated MLP, or experts among which a router chooses for each token.

    MLP(x) = W_down (act(W_gate x) * W_up x)                  gpt-oss: g sigmoid(1.702 g) (u + 1), g <= 7, |u| <= 7
    y      = sum_e r_e(x) MLP_e(x) + MLP_shared(x)          r = softmax(W_router x), but 0 beyond the k largest
             Llama 4: MLP_e(r_e(x) x)

Experts are stacks of matrices, kernels [experts, in, out]. Every expert gets every token, those that are not its own as
zeros: a token keeps its place whatever the routing, so what an expert saw is plain to see in one batched product, and a
model and its quantized twin, which may choose differently, stay comparable token by token. The price is arithmetic,
experts / k times that of the chosen ones. A single position, as text is generated, pays less: where its tokens choose
fewer experts than there are, the matrices of these are picked from the stack, and no others are read.

Sources: Mixtral, arXiv:2401.04088, section 2; DeepSeekMoE, arXiv:2401.06066, section 3, for shared experts; DeepSeek-V2
and V3, arXiv:2405.04434, section 2.2, and arXiv:2412.19437, section 2.1, for groups, sigmoids and the choice's bias;
gpt-oss, arXiv:2508.10925, section 2.2, for clamps and biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from qjax.models.config import DecoderConfig
from qjax.typing import Array, Bool, Float

LIMIT, STEEPNESS = 7.0, 1.702  # of gpt-oss's activation


def gated(c: DecoderConfig, gate: Array, up: Array) -> Array:
    """What an MLP's last matrix reads."""
    if c.activation == "clamped_swiglu":
        gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
        return gate * nn.sigmoid(STEEPNESS * gate) * (up + 1)
    return (nn.silu(gate) if c.activation == "silu" else nn.gelu(gate, approximate=True)) * up


class Stacked(nn.Module):
    """y_e = x_e W_e (+ b_e) of every expert, or of those of `entries`: [experts, *b, in] -> [experts, *b, out]."""

    experts: int
    out: int
    bias: bool = False
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general

    @nn.compact
    def __call__(self, x, entries=None):
        def some(stack):
            return stack if entries is None else jnp.take(stack, entries, axis=0, mode="clip")

        init = nn.initializers.lecun_normal(batch_axis=(0,))
        kernel = some(self.param("kernel", init, (self.experts, x.shape[-1], self.out), jnp.float32))
        dimensions = (((x.ndim - 2,), (0,)), ((), ()))
        y = jax.vmap(lambda x, w: self.dot_general(x, w, dimensions))(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.bias:
            return y
        bias = some(self.param("bias", nn.initializers.zeros, (self.experts, self.out), jnp.float32))
        return y + bias.astype(y.dtype).reshape(x.shape[0], *(1,) * (x.ndim - 2), self.out)


class MLP(nn.Module):
    """One gated MLP, or with `stacked` one for each entry of the input's first axis: all experts, or those named."""

    config: DecoderConfig
    hidden: int
    stacked: bool = False
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general

    @nn.compact
    def __call__(self, x, seen=None, entries=None):
        c = self.config

        def dense(name, out):
            if self.stacked:
                how = {"dtype": self.dtype, "dot_general": self.dot_general, "name": name}
                return partial(Stacked(c.experts, out, c.expert_bias, **how), entries=entries)
            return nn.Dense(out, use_bias=False, name=name, dtype=self.dtype, dot_general=self.dot_general)

        if c.fused_mlp and not self.stacked:
            gate, up = jnp.split(dense("gate_up", 2 * self.hidden)(x), 2, axis=-1)
        else:
            gate, up = dense("gate", self.hidden)(x), dense("up", self.hidden)(x)
        inner = gated(c, gate, up)
        if seen is not None:  # biases make something of a token of zeros
            inner = jnp.where(seen, inner, jnp.zeros_like(inner))
        return dense("down", c.dim)(inner)


class Mixture(nn.Module):
    """Experts, the router that chooses among them, and the one that sees every token where there is one."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general

    @nn.compact
    def __call__(self, x):
        c = self.config

        def dense(name, out, bias=False):
            return nn.Dense(out, use_bias=bias, name=name, dtype=self.dtype, dot_general=self.dot_general)

        def mlp(name, hidden, stacked=False):
            return MLP(c, hidden, stacked, self.dtype, self.dot_general, name=name)

        bias = self.param("router_bias", nn.initializers.zeros, (c.experts,), jnp.float32) if c.router_bias else None
        chosen, share = routed(c, dense("router", c.experts, c.expert_bias)(x), bias)
        y = added(c, mlp("experts", c.expert_hidden, stacked=True), x, chosen, share)
        if c.shared_hidden:
            shared = mlp("shared", c.shared_hidden)(x)
            y = y + (nn.sigmoid(dense("shared_gate", 1)(x)) * shared if c.shared_gate else shared)
        return y


def added(c: DecoderConfig, experts: MLP, x: Array, chosen: Bool[Array, "*b e"], share: Float[Array, "*b e"]) -> Array:
    """The sum of what a token's experts make of it, [*b, dim]."""
    tokens = math.prod(x.shape[:-1])
    if x.shape[-2] == 1 and tokens * c.experts_used < c.experts:
        return _picked(c, experts, x.reshape(tokens, -1), chosen.reshape(tokens, -1), share).reshape(x.shape)
    chosen, share = (jnp.moveaxis(a, -1, 0)[..., None] for a in (chosen, share))
    read = x[None] * share.astype(x.dtype) if c.expert_inputs else x[None]
    sent = jnp.where(chosen, read, jnp.zeros_like(x)[None])
    y = experts(sent, chosen if c.expert_bias else None).astype(jnp.float32)
    return jnp.sum(y if c.expert_inputs else y * share, axis=0).astype(x.dtype)


def _picked(
    c: DecoderConfig, experts: MLP, x: Float[Array, "t d"], chosen: Bool[Array, "t e"], share: Float[Array, "*b e"]
) -> Float[Array, "t d"]:
    """`added` of a few tokens, by the matrices of their experts alone."""
    entries = jnp.argsort(~chosen, axis=-1, stable=True)[:, : c.experts_used]
    share = jnp.take_along_axis(share.reshape(chosen.shape), entries, axis=-1)[..., None]
    read = (
        x[:, None] * share.astype(x.dtype) if c.expert_inputs else jnp.broadcast_to(x[:, None], (*entries.shape, c.dim))
    )
    y = experts(read.reshape(entries.size, 1, c.dim), entries=entries.reshape(-1)).astype(jnp.float32)
    y = y.reshape(*entries.shape, c.dim)
    return jnp.sum(y if c.expert_inputs else y * share, axis=1).astype(x.dtype)


def routed(
    c: DecoderConfig, scores: Float[Array, "*b e"], bias: Float[Array, "e"] | None = None
) -> tuple[Bool[Array, "*b e"], Float[Array, "*b e"]]:
    """Which experts a token goes to, and the share of each in its output, f32; 0 where it does not go."""
    scores = scores.astype(jnp.float32)
    p = jax.nn.softmax(scores, axis=-1) if c.router == "softmax" else nn.sigmoid(scores)
    rank = p if bias is None else p + bias.reshape((1,) * (p.ndim - 1) + bias.shape)
    if c.expert_groups:
        grouped = rank.reshape(*rank.shape[:-1], c.expert_groups, -1)
        good = jnp.sum(lax.top_k(grouped, c.expert_group_best)[0], axis=-1)
        rank = jnp.where(_largest(good, c.expert_groups_used)[..., None], grouped, -jnp.inf).reshape(rank.shape)
    chosen = _largest(rank, c.experts_used)
    share = jnp.where(chosen, p, 0.0)
    share = share / (jnp.sum(share, axis=-1, keepdims=True) + 1e-20) if c.expert_norm else share
    return chosen, share * c.expert_scale


def _largest(x: Float[Array, "*b n"], k: int) -> Bool[Array, "*b n"]:
    """Where the k largest of each row are."""
    return jnp.any(jax.nn.one_hot(lax.top_k(x, k)[1], x.shape[-1], dtype=bool), axis=-2)
