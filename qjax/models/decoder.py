"""A Llama-family decoder in plain flax linen: no quantization code in it.

    x   = E[tokens]
    x  += W_o attention(rope(W_q n(x)), rope(W_k n(x)), W_v n(x))        n = RMSNorm
    x  += W_down (act(W_gate n(x)) * W_up n(x))
    logits = W_head n(x)                                                  (W_head = E^T when tied)

Weights are flax kernels, (in, out). Their paths: `embed/embedding`, `layers_3/attn/{q,k,v,o}/kernel`,
`layers_3/mlp/{gate,up,down}/kernel`, `layers_3/{attn_norm,mlp_norm}/scale`, `final_norm/scale`, `head/kernel`; where a
family keeps several in one, `attn/qkv` and `mlp/gate_up`; `attn/sinks` (heads,) where it has any. A layer of experts
(mlp.py) has `mlp/router/kernel`, `mlp/experts/{gate,up,down}/kernel` (experts, in, out) and, where one sees all,
`mlp/shared/{gate,up,down}/kernel`.
Layers are separate entries of the tree, not one stacked array, because after quantization every layer may have a
format of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from qjax.models.cache import Cache, appended, remembered
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.latent import latent_heads
from qjax.models.mlp import MLP, Mixture


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling | None, length: Any = 0) -> jax.Array:
    """Rotary angles per position, f_i = theta^(-2i/dim), rescaled for long contexts. Returns f32[dim/2]."""
    f = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return f if scaling is None else f / rope_divisors(dim, theta, scaling, length)


def rope_divisors(dim: int, theta: float, scaling: RopeScaling, length: Any = 0) -> jax.Array:
    """What long-context scaling divides each rotary frequency by: f32[dim/2].

    For Llama 3 with wavelengths l_i = 2 pi / f_i, b_i = clip((original / l_i - low) / (high - low), 0, 1):
    1 / divisor_i = (1 - b_i) / factor + b_i. GGUF files store this as the tensor `rope_freqs.weight`. YaRN's b falls
    along i, from where a wave turns beta_fast times to where it turns beta_slow times. LongRoPE asks for the `length`
    of the text so far.
    """
    if scaling.kind == "linear":
        return jnp.full(dim // 2, scaling.factor, jnp.float32)
    if scaling.kind == "table":
        return jnp.array(scaling.divisors, jnp.float32)
    if scaling.kind == "longrope":
        long, short = (jnp.array(d, jnp.float32) for d in (scaling.divisors, scaling.short_divisors))
        return jnp.where(jnp.asarray(length) > scaling.original_max_position, long, short)
    if scaling.kind == "yarn":

        def place(turns: float) -> float:
            return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = place(scaling.beta_fast), place(scaling.beta_slow)
        first, last = (math.floor(first), math.ceil(last)) if scaling.truncate else (first, last)
        first, last = max(first, 0), min(last, dim - 1)
        along = (jnp.arange(dim // 2, dtype=jnp.float32) - first) / max(last - first, 0.001)
        blend = 1 - jnp.clip(along, 0.0, 1.0)
    else:
        f = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        blend = jnp.clip((scaling.original_max_position * f / (2 * jnp.pi) - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - blend) / scaling.factor + blend)


def rotate(
    x: jax.Array, positions: jax.Array, frequencies: jax.Array, factor: float = 1.0, pairs: bool = False
) -> jax.Array:
    """Rotate the halves of each head by position * frequency (the Hugging Face convention).

    Args:
      x: [batch, length, heads, head_dim].
      positions: i32[length].
      frequencies: f32[rotated / 2]; the rest of a head stays as it is.
      factor: what the rotated part is multiplied with (YaRN, LongRoPE).
      pairs: rotate neighbours with each other in place of halves.
    """
    n = 2 * frequencies.shape[0]
    if n < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :n], positions, frequencies, factor, pairs), x[..., n:]], axis=-1)
    angle = positions[:, None].astype(jnp.float32) * frequencies[None, :]
    cos, sin = jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    y = x.astype(jnp.float32)
    a, b = (y[..., 0::2], y[..., 1::2]) if pairs else jnp.split(y, 2, axis=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    y = jnp.stack([a, b], axis=-1).reshape(x.shape) if pairs else jnp.concatenate([a, b], axis=-1)
    return y.astype(x.dtype)


def unit(x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean x^2 + eps) along the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean x^2 + eps) * (scale + offset) / divisor, computed in float32."""

    eps: float
    offset: float = 0.0
    divisor: float = 1.0

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = unit(x.astype(jnp.float32), self.eps)
        y = y * (scale.astype(jnp.float32) + self.offset)[(None,) * (x.ndim - 1)]
        return (y if self.divisor == 1.0 else y / self.divisor).astype(x.dtype)


def softcapped(z: jax.Array, cap: float | None) -> jax.Array:
    """Gemma 2's cap tanh(z / cap) of scores or logits; None: z."""
    return z if cap is None else cap * jnp.tanh(z / cap)


def embedded(c: DecoderConfig, x: jax.Array) -> jax.Array:
    """Embeddings as the first layer reads them."""
    x = x * jnp.asarray(c.dim**0.5, x.dtype) if c.embed_scale else x
    return x if c.embed_multiplier == 1.0 else x * jnp.asarray(c.embed_multiplier, x.dtype)


def attend(q, k, v, mask, scale: float, softcap: float | None, sinks=None):
    """Grouped-query attention: softmax(scale q k^T) v, each kv head serving heads/kv_heads queries.

    With sinks b the softmax of head h is over [scale q k^T, b_h], and what falls on the last is attended to nowhere
    (StreamingLLM, arXiv:2309.17453, section 3.3, learned).

    Args:
      q: [b, t, heads, d].
      k, v: [b * kv_heads, s, d].
      mask: bool[t, s], True where a query may look.
      sinks: [heads], or None.

    Returns: [b, t, heads * d], d that of v, which may be another than of q and k.
    """
    b, t, heads, d = q.shape
    n, s, _ = k.shape
    kv = n // b
    rows = heads // kv * t
    # The queries of a group are rows of one matrix: plain batched products, much faster on CPU than five-axis ones.
    q = q.reshape(b, t, kv, heads // kv, d).transpose(0, 2, 3, 1, 4).reshape(n, rows, d)
    scores = jnp.einsum("nrd,nsd->nrs", q, k, preferred_element_type=jnp.float32) * scale
    scores = softcapped(scores, softcap)
    scores = jnp.where(mask[None, None], scores.reshape(n, heads // kv, t, s), -1e30)
    if sinks is not None:
        beside = jnp.tile(sinks.astype(jnp.float32).reshape(kv, heads // kv), (b, 1))[..., None, None]
        scores = jnp.concatenate([scores, jnp.broadcast_to(beside, (*scores.shape[:-1], 1))], axis=-1)
    p = jax.nn.softmax(scores, axis=-1)[..., :s].reshape(n, rows, s).astype(v.dtype)
    o = jnp.einsum("nrs,nsd->nrd", p, v, preferred_element_type=jnp.float32).astype(v.dtype)
    return o.reshape(b, kv, heads // kv, t, -1).transpose(0, 3, 1, 2, 4).reshape(b, t, -1)


def attend_causally(q, k, v, window: int | None, scale: float, softcap: float | None, sinks=None, chunk=None):
    """`attend` among the positions of one sequence, query i seeing keys i-window+1..i of its chunk.

    Queries go in up to four blocks, each with only the keys that its mask leaves: 3/8 less work at equal results.
    """
    t, blocks = q.shape[1], []
    size = max(128, -(-t // 4))
    for first in range(0, t, size):
        last = min(first + size, t)
        oldest = 0 if window is None else max(0, first - window + 1)
        oldest = oldest if chunk is None else max(oldest, first // chunk * chunk)
        mask = visible(jnp.arange(first, last), jnp.arange(oldest, last), window, chunk)
        blocks.append(attend(q[:, first:last], k[:, oldest:last], v[:, oldest:last], mask, scale, softcap, sinks))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def visible(queries: jax.Array, keys: jax.Array, window: int | None, chunk: int | None = None) -> jax.Array:
    """Which key positions [s] the query positions [t] may look at: bool[t, s]."""
    distance = queries[:, None] - keys[None, :]
    mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return mask if chunk is None else mask & (queries[:, None] // chunk == keys[None, :] // chunk)


def as_it_is(name: str, x: jax.Array) -> jax.Array:
    """What the cache stores of keys ("k") and values ("v"): all of them."""
    return x


class Attention(nn.Module):
    config: DecoderConfig
    layer: int
    dtype: Any = jnp.float32
    dot_general: Callable = lax.dot_general
    stored: Callable = as_it_is

    @nn.compact
    def __call__(self, x, positions, cache=None):
        c = self.config

        def dense(name, out, bias=False):
            return nn.Dense(out, use_bias=bias, name=name, dtype=self.dtype, dot_general=self.dot_general)

        b, t, _ = x.shape
        q_dim, kv_dim = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def turned(y):
            if (turning := c.layer_theta(self.layer)) is None:
                return y
            theta, scaling = turning
            frequencies = rope_frequencies(c.rotated, theta, scaling, positions[-1] + 1)
            factor = 1.0 if scaling is None else scaling.attention_factor
            return rotate(y, positions, frequencies, factor, c.rope_pairs)

        if c.kv_rank:
            q, k, v = latent_heads(c, dense, lambda name: RMSNorm(c.norm_eps, name=name), turned, x)
        elif c.fused_qkv:
            qkv = dense("qkv", q_dim + 2 * kv_dim, c.qkv_bias)(x)
            q, k, v = jnp.split(qkv, (q_dim, q_dim + kv_dim), axis=-1)
        else:
            q, k, v = (dense(name, n, c.qkv_bias)(x) for name, n in (("q", q_dim), ("k", kv_dim), ("v", kv_dim)))

        def by_head(y, name, heads):
            norm = RMSNorm(c.norm_eps, c.norm_offset, name=name) if c.qk_norm else lambda y: y
            y = norm(y) if c.qk_norm_whole else y
            y = y.reshape(b, t, heads, c.head_dim)
            return y if c.qk_norm_whole else norm(y)

        if not c.kv_rank:
            q, k = turned(by_head(q, "q_norm", c.heads)), turned(by_head(k, "k_norm", c.kv_heads))
            if c.qk_unit and self.layer not in c.nope_layers:
                q, k = unit(q, c.norm_eps), unit(k, c.norm_eps)
            if c.growth and self.layer in c.nope_layers:
                grown = 1 + c.growth * jnp.log1p(jnp.floor((positions + 1).astype(jnp.float32) / c.growth_every))
                q = (q.astype(jnp.float32) * grown[None, :, None, None]).astype(q.dtype)
            v = v.reshape(b, t, c.kv_heads, c.head_dim)
        k, v = (y.transpose(0, 2, 1, 3).reshape(b * c.kv_heads, t, y.shape[-1]) for y in (k, v))
        k, v = self.stored("k", k), self.stored("v", v)
        scale = c.score_scale
        window, chunk = c.layer_window(self.layer), c.layer_chunk(self.layer)
        sinks = self.param("sinks", nn.initializers.zeros, (c.heads,), jnp.float32) if c.sinks else None
        if cache is None:
            o = attend_causally(q, k, v, window, scale, c.attn_softcap, sinks, chunk)
        else:
            start = positions[0]
            cache = {name: appended(cache[name], y, start) for name, y in (("k", k), ("v", v))}
            k, v = remembered(cache["k"]), remembered(cache["v"])
            # Slots past the filled part lie after every query, so the causal mask hides them too.
            mask = visible(positions, jnp.arange(k.shape[1]), window, chunk)
            o = attend(q, k, v, mask, scale, c.attn_softcap, sinks)
        return dense("o", c.dim, c.o_bias)(o), cache


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

        y, cache = Attention(c, self.layer, self.dtype, self.dot_general, self.stored, name="attn")(
            norm("attn_norm", x, c.pre_norms), positions, cache
        )
        x = added(x, norm("attn_post_norm", y, c.post_norms))
        if c.has_experts(self.layer):
            mlp = Mixture(c, self.dtype, self.dot_general, name="mlp")
        else:
            mlp = MLP(c, c.hidden, False, self.dtype, self.dot_general, name="mlp")
        y = mlp(norm("mlp_norm", x, c.pre_norms))
        return added(x, norm("mlp_post_norm", y, c.post_norms)), cache


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
