"""A decoder cut where its residual stream can be stored: embedding, blocks, head, each a pure function.

    x_0 = embed(tokens)      x_{i+1} = block_i(x_i)      logits = head(x_L)             == Decoder(config)(tokens)

A piece is run with its own weights only, so a model larger than memory can pass through one piece at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, RMSNorm, embedded, softcapped
from qjax.typing import Array, Float, Int

Apply = Callable[[Any, Array], Array]


@dataclasses.dataclass(frozen=True)
class Stages:
    """The pieces of a decoder.

    Attributes:
      embed: ({"embed"}, tokens i32[b, t]) -> x f32[b, t, dim].
      blocks: one function a layer: (params["layers_i"], x) -> x. Layers that do the same are the same function.
      head: ({"final_norm", "head" or, tied, "embed"}, x) -> logits f32[b, t, vocab].
      tied: whether the head is the embedding.
    """

    embed: Apply
    blocks: tuple[Apply, ...]
    head: Apply
    tied: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks' names in the params tree."""
        return tuple(f"layers_{i}" for i in range(len(self.blocks)))


@lru_cache(maxsize=16)
def stages_of(config: DecoderConfig) -> Stages:
    """The pieces of a config's decoder in float32."""
    c = config
    alike: dict[Any, Apply] = {}

    def block_of(layer: int) -> Apply:
        def block(params: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
            positions = jnp.arange(x.shape[1], dtype=jnp.int32)
            y: Any = Block(c, layer).apply({"params": params}, x, positions)
            return y[0]

        return block

    blocks = []
    for i in range(c.layers):
        kind = (c.layer_window(i), c.layer_theta(i))
        blocks.append(alike.setdefault(kind, block_of(i)))

    def embed(params: Any, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        x = jnp.take(params["embed"]["embedding"], tokens, axis=0)
        return embedded(c, x)

    def head(params: Any, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        y: Any = RMSNorm(c.norm_eps, c.norm_offset, c.logit_divisor).apply({"params": params["final_norm"]}, x)
        w = params["embed"]["embedding"] if c.tied else params["head"]["kernel"]
        logits = lax.dot_general(y, w, (((2,), (1 if c.tied else 0,)), ((), ())))
        return softcapped(logits, c.logit_softcap)

    return Stages(embed, tuple(blocks), head, c.tied)
