"""A decoder cut where its residual stream can be stored: embedding, blocks, head, each a pure function.

    x_0 = embed(tokens)      x_{i+1} = block_i(x_i)      logits = head(x_L)             == Decoder(config)(tokens)
    head(x) = scores(norm(x)), and scores of a part of the vocabulary exist without those of the rest

A piece is run with its own weights only, so a model larger than memory can pass through one piece at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.models.attention import softcapped
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, embedded
from qjax.models.norm import RMSNorm
from qjax.typing import Array, Float, Int

Apply = Callable[[Any, Array], Array]


@dataclasses.dataclass(frozen=True)
class Stages:
    """The pieces of a decoder.

    Attributes:
      embed: ({"embed"}, tokens i32[b, t]) -> x f32[b, t, dim].
      blocks: one function a layer: (params["layers_i"], x) -> x. Layers that do the same are the same function.
      to_all: the same blocks with every token sent to all experts; equal to `blocks` where there are none.
      head: ({"final_norm", "head" or, tied, "embed"}, x) -> logits f32[b, t, vocab].
      norm: the head's first half: (its params, x) -> n f32[b, t, dim].
      scores: its second: (its params, n, start, count) -> f32[*b, count], the logits of `count` tokens from `start` on;
        its params may be those of these tokens alone.
      tied: whether the head is the embedding.
      vocab, dim, head_dim: tokens of the vocabulary, width of the residual stream, of an attention head.
    """

    embed: Apply
    blocks: tuple[Apply, ...]
    to_all: tuple[Apply, ...]
    head: Apply
    norm: Apply
    scores: Callable[[Any, Array, Any, int], Array]
    tied: bool
    vocab: int
    dim: int
    head_dim: int

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' names in the params tree."""
        return tuple(f"layers_{i}" for i in range(len(self.blocks)))


@lru_cache(maxsize=16)
def stages_of(config: DecoderConfig) -> Stages:
    """The pieces of a config's decoder in float32."""
    c = config
    alike: dict[Any, Apply] = {}

    def block_of(c: DecoderConfig, layer: int) -> Apply:
        def block(params: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)
            y: Any = Block(c, layer).apply({"params": params}, x, positions)
            return y[0]

        return block

    def alike_of(c: DecoderConfig, layer: int) -> Apply:
        used = c.experts_used if c.has_experts(layer) else 0
        kind = (c.layer_window(layer), c.layer_theta(layer), used, c.is_linear(layer))
        return alike.setdefault(kind, block_of(c, layer))

    blocks = tuple(alike_of(c, i) for i in range(c.layers))
    to_all = tuple(alike_of(dataclasses.replace(c, experts_used=c.experts), i) for i in range(c.layers))

    def embed(params: Any, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
        return embedded(c, x)

    def norm(params: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        y: Any = RMSNorm(c.norm_eps, c.norm_offset, c.logit_divisor).apply({"params": params["final_norm"]}, x)
        return y

    def scores(params: Any, n: Float[Array, "*b d"], start: Any, count: int) -> Float[Array, "*b v"]:
        w, axis = (params["embed"]["embedding"], 0) if c.tied else (params["head"]["kernel"], 1)
        w = w if count == w.shape[axis] else lax.dynamic_slice_in_dim(w, start, count, axis)
        logits = lax.dot_general(n, w, (((n.ndim - 1,), (1 - axis,)), ((), ())))
        return softcapped(logits, c.logit_softcap)

    def head(params: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        return scores(params, norm(params, x), 0, c.vocab)

    return Stages(embed, blocks, to_all, head, norm, scores, c.tied, c.vocab, c.dim, c.head_dim)
