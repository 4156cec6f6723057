"""Gated delta rule: attention without a softmax, whose memory of all that came before is one matrix a head.

    S_t = a_t S_{t-1} + b_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t
    a_t = exp(-exp(A_log) softplus(W_alpha x_t + dt_bias))        b_t = sigmoid(W_beta x_t)
    q, k, v = silu(conv(W_qkv x))     q and k of length 1, q over sqrt(key_dim)     y = W_o (n(o) silu(W_gate x))

The convolution is of each channel by itself, over its last few tokens. What a step keeps is S and those tokens, however
long the text is. Source: Gated Delta Networks, arXiv:2412.06464, sections 3.1 (the rule) and 3.3 (in chunks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from qjax.models.config import DecoderConfig, LinearAttention
from qjax.models.norm import RMSNorm
from qjax.typing import Array, Float

CHUNK = 64
"""Tokens whose steps are taken together."""
EPS = 1e-6
"""Beside the squared length of q and k."""


class GatedDeltaNet(nn.Module):
    """A layer of it: matrices `qkv`, `gate`, `alpha`, `beta` (or both as `ba`), `o`; `conv`, `A_log`, `dt_bias`."""

    config: DecoderConfig
    rule: LinearAttention
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general

    @nn.compact
    def __call__(self, x, positions, cache=None):
        """x [b, t, dim], positions i32[t], -1 where a token is padding: what is kept passes these by."""
        c, r = self.config, self.rule
        b, t, _ = x.shape

        def dense(name, out):
            return nn.Dense(out, use_bias=False, name=name, dtype=self.dtype, dot_general=self.dot_general)

        def vector(name, init):
            return self.param(name, init, (r.value_heads,), jnp.float32)[None, None]

        real = (positions >= 0)[None, :, None]
        kernel = self.param("conv", nn.initializers.lecun_normal(), (r.channels, r.width), jnp.float32)
        kept = empty_memory(r, b) if cache is None else cache
        inputs = jnp.concatenate([kept["conv"].astype(x.dtype), dense("qkv", r.channels)(x)], axis=1)
        q, k, v = jnp.split(nn.silu(causal_conv(inputs, kernel)), (r.keys, 2 * r.keys), axis=-1)
        q, k = (normalized(y.reshape(b, t, r.key_heads, r.key_dim)) for y in (q, k))
        q, k = (shared(y, r) for y in (q * r.key_dim**-0.5, k))
        v = v.reshape(b, t, r.value_heads, r.value_dim).astype(jnp.float32)
        if r.tiled:
            beta, alpha = (dense(name, r.value_heads)(x) for name in ("beta", "alpha"))
        else:
            both = jnp.split(dense("ba", 2 * r.value_heads)(x).reshape(b, t, r.key_heads, -1), 2, axis=-1)
            beta, alpha = (y.reshape(b, t, r.value_heads) for y in both)
        alpha, beta = alpha.astype(jnp.float32), beta.astype(jnp.float32)
        step = nn.softplus(alpha + vector("dt_bias", nn.initializers.ones))
        log_a, write = -jnp.exp(vector("A_log", nn.initializers.zeros)) * step, nn.sigmoid(beta)
        log_a, write = jnp.where(real, log_a, 0.0), jnp.where(real, write, 0.0)
        o, state = gated_delta_rule(q, k, v, log_a, write, kept["state"])
        if cache is not None:
            last = lax.dynamic_slice_in_dim(inputs, jnp.sum(real), r.width - 1, axis=1)
            cache = {"conv": last.astype(cache["conv"].dtype), "state": state}
        gate = dense("gate", r.value_heads * r.value_dim)(x).reshape(o.shape).astype(jnp.float32)
        o = RMSNorm(c.norm_eps, name="norm")(o) * nn.silu(gate)
        return dense("o", c.dim)(o.reshape(b, t, -1).astype(x.dtype)), cache


def empty_memory(rule: LinearAttention, batch: int, dtype: Any = jnp.float32) -> dict[str, Array]:
    """What a layer keeps of a text that has not begun."""
    state = jnp.zeros((batch, rule.value_heads, rule.key_dim, rule.value_dim), jnp.float32)
    return {"conv": jnp.zeros((batch, rule.width - 1, rule.channels), dtype), "state": state}


def causal_conv(x: Float[Array, "b s c"], kernel: Float[Array, "c w"]) -> Float[Array, "b t c"]:
    """y_t = sum_j kernel_j x_{t + j} of each channel, float32; t = s - w + 1, and the last entry is a token's own."""
    width = kernel.shape[1]
    t = x.shape[1] - width + 1
    taps = kernel.astype(jnp.float32).T[:, None, None]
    return jnp.stack([taps[j] * x[:, j : j + t].astype(jnp.float32) for j in range(width)]).sum(axis=0)


def normalized(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / |x|, float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + EPS)


def shared(x: Float[Array, "b t k d"], rule: LinearAttention) -> Float[Array, "b t v d"]:
    """Of each value head its key head: the one of its group, or with `tiled` all in turn."""
    times = rule.value_heads // rule.key_heads
    return jnp.tile(x, (1, 1, times, 1)) if rule.tiled else jnp.repeat(x, times, axis=2)


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_a: Float[Array, "b t h"],
    write: Float[Array, "b t h"],
    state: Float[Array, "b h k v"],
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """The rule over a text, float32, and the memory behind it; log_a is ln a, write b of the equations above.

    In a chunk with g_i = ln(a_1 .. a_i), D_ij = exp(g_i - g_j) for j <= i and A_ij = b_i D_ij k_i . k_j for j < i:

        u = (I + A)^-1 (b v - b e^g K S)      o = e^g Q S + (D * Q K^T) u      S' = e^{g_C} S + (e^{g_C - g} K)^T u
    """
    t = q.shape[1]
    size = min(CHUNK, t)

    def chunks(x: Array) -> Array:  # [chunks, b, h, size, ...]; what is padded writes nothing and forgets nothing
        x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), (1, 3), (0, 2))

    def chunk(S: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, log_a, write = parts
        g = jnp.cumsum(log_a, axis=-1)
        D = jnp.exp(jnp.where(jnp.tri(size, dtype=bool)[None, None], g[..., :, None] - g[..., None, :], -jnp.inf))
        A = jnp.tril(write[..., None] * D * (k @ k.mT), -1)
        grown = jnp.exp(g)[..., None]
        u = lax.linalg.triangular_solve(
            A, write[..., None] * (v - grown * (k @ S)), left_side=True, lower=True, unit_diagonal=True
        )
        left = jnp.exp(g[..., -1:, None] - g[..., None])
        return grown[..., -1:, :] * S + (left * k).mT @ u, grown * (q @ S) + (D * (q @ k.mT)) @ u

    state, o = lax.scan(jax.checkpoint(chunk), state, tuple(chunks(x) for x in (q, k, v, log_a, write)))
    o = jnp.moveaxis(o, (0, 2), (1, 3))
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :t], state
