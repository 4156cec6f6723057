"""A Llama-family decoder in plain flax linen: no quantization code in it.

    x   = E[tokens]
    x  += W_o attention(rope(W_q n(x)), rope(W_k n(x)), W_v n(x))        n = RMSNorm
    x  += W_down (act(W_gate n(x)) * W_up n(x))
    logits = W_head n(x)                                                  (W_head = E^T when tied)

Weights are flax kernels, (in, out). Their paths: `embed/embedding`, `layers_3/attn/{q,k,v,o}/kernel`,
`layers_3/mlp/{gate,up,down}/kernel`, `layers_3/{attn_norm,mlp_norm}/scale`, `final_norm/scale`, `head/kernel`; where a
family keeps several in one, `attn/qkv` and `mlp/gate_up`; `attn/sinks` (heads,) where it has any; `out_scale` (1,)
where what leaves a layer is multiplied with it. A layer of linear attention (linear_attention.py) has
`linear_attn/{qkv,gate,alpha,beta,o}/kernel` and what they go with in place of `attn`. A layer of experts
(mlp.py) has `mlp/router/kernel`, `mlp/experts/{gate,up,down}/kernel` (experts, in, out) and, where one sees all,
`mlp/shared/{gate,up,down}/kernel`; where both are beside each other (beside.py), norms of theirs as well.
Layers are separate entries of the tree, not one stacked array, because after quantization every layer may have a
format of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from qjax.models.attention import Attention, as_it_is, softcapped
from qjax.models.beside import Beside
from qjax.models.cache import Cache
from qjax.models.config import DecoderConfig
from qjax.models.linear_attention import GatedDeltaNet
from qjax.models.mlp import MLP, Mixture
from qjax.models.norm import RMSNorm


def embedded(c: DecoderConfig, x: jax.Array) -> jax.Array:
    """Embeddings as the first layer reads them."""
    x = x * jnp.asarray(c.dim**0.5, x.dtype) if c.embed_scale else x
    return x if c.embed_multiplier == 1.0 else x * jnp.asarray(c.embed_multiplier, x.dtype)


class Block(nn.Module):
    config: DecoderConfig
    layer: int
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general
    stored: Callable = as_it_is

    @nn.compact
    def __call__(self, x, positions, cache=None):
        c = self.config

        def norm(name, y, present):
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(y) if present else y

        def added(x, y):
            return x + y if c.residual_multiplier == 1.0 else x + y * jnp.asarray(c.residual_multiplier, y.dtype)

        if c.is_linear(self.layer):
            mix = GatedDeltaNet(c, c.linear, self.dtype, self.dot_general, name="linear_attn")
        else:
            mix = Attention(c, self.layer, self.dtype, self.dot_general, self.stored, name="attn")
        y, cache = mix(norm("attn_norm", x, c.pre_norms), positions, cache)
        x = added(x, norm("attn_post_norm", y, c.post_norms))
        if c.has_experts(self.layer) and c.experts_beside:
            y = Beside(c, self.dtype, self.dot_general, name="mlp")(x)
        elif c.has_experts(self.layer):
            y = Mixture(c, self.dtype, self.dot_general, name="mlp")(norm("mlp_norm", x, c.pre_norms))
        else:
            mlp = MLP(c, c.hidden, False, self.dtype, self.dot_general, name="mlp")
            y = mlp(norm("mlp_norm", x, c.pre_norms))
        x = added(x, norm("mlp_post_norm", y, c.post_norms))
        if c.out_scale:
            x = x * self.param("out_scale", nn.initializers.ones, (1,), jnp.float32).astype(x.dtype)[None, None]
        return x, cache


class Decoder(nn.Module):
    """The decoder. `apply({"params": p}, tokens)` gives f32 logits [batch, length, vocab].

    With `cache` (see `empty_cache`) the tokens continue the cached ones and the new cache comes back as well; all rows
    of the batch are equally long, and `length + cached` must not exceed the cache's capacity. `at` asks for the logits
    of one position only, [batch, 1, vocab]. `dtype` is the arithmetic of activations; `dot_general` may be
    replaced, e.g. by one that fits the hardware. `stored`: ("k" or "v", [batch * kv_heads, length, head_dim]) -> what
    the cache would give back of it, of the same shape and type, with or without a cache. Without `readout` it gives
    what the head reads, [batch, length, dim] of `dtype`, in place of logits.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general
    stored: Callable = as_it_is
    readout: bool = True

    @nn.compact
    def __call__(self, tokens, cache: Cache | None = None, at=None):
        c = self.config
        start = jnp.int32(0) if cache is None else cache["length"]
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        embed = nn.Embed(c.vocab, c.dim, name="embed", dtype=self.dtype, embedding_init=nn.initializers.normal(0.02))
        x = embedded(c, embed(tokens))
        new_cache: Cache = {"length": start + tokens.shape[1]}
        for i in range(c.layers):
            name = f"layers_{i}"
            block = Block(c, i, self.dtype, self.dot_general, self.stored, name=name)
            x, new_cache[name] = block(x, positions, None if cache is None else cache[name])
        if at is not None:
            x = lax.dynamic_slice_in_dim(x, at, 1, axis=1)
        # Logits are divided where the head reads, so that whoever cuts here has them right.
        x = RMSNorm(c.norm_eps, c.norm_offset, c.logit_divisor, name="final_norm")(x)
        if not self.readout:
            return x if cache is None else (x, new_cache)
        if c.tied:
            kernel = embed.embedding.T.astype(self.dtype)
            logits = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        else:
            logits = nn.Dense(c.vocab, use_bias=False, name="head", dtype=self.dtype, dot_general=self.dot_general)(x)
        logits = logits.astype(jnp.float32)
        logits = softcapped(logits, c.logit_softcap)
        return logits if cache is None else (logits, new_cache)
