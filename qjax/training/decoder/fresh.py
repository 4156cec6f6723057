"""A model that is still to be trained: a Llama of a config's size, with random weights of a seed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model


def fresh_model(size: Any, vocab: int, seed: int) -> Model:
    """A Llama with a tied head, without a tokenizer.

    Args:
      size: has dim, hidden, layers, heads, kv_heads and context, as a config says them; heads are dim / heads wide.
    """
    config = DecoderConfig(
        vocab=vocab, dim=size.dim, hidden=size.hidden, layers=size.layers, heads=size.heads, kv_heads=size.kv_heads,
        head_dim=size.dim // size.heads, context=size.context, tied=True,
    )  # fmt: skip
    return Model(config, jax.jit(Decoder(config).init)(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"])
