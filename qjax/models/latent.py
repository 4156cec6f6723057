"""Latent attention: queries, and keys with values, come out of few numbers a token; a part of each head is rotated.

    [q, q'] = W_qb n(W_qa x)                      or W_q x
    [c, r]  = W_kva x     [k, v] = W_kvb n(c)     a head's query and key: [q, rope(q')], [k, rope(r)]

r is one for all heads. Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from qjax.models.config import DecoderConfig
from qjax.typing import Array, Float

Made = tuple[Float[Array, "b t h d"], Float[Array, "b t h d"], Float[Array, "b t h e"]]


def latent_heads(
    c: DecoderConfig,
    dense: Callable[[str, int], Any],
    norm: Callable[[str], Any],
    turned: Callable[[Array], Array],
    x: Float[Array, "b t n"],
) -> Made:
    """Queries, keys and values of every head, rotated.

    Args:
      c: the decoder.
      dense: (name, outputs) -> a layer of that name.
      norm: name -> a norm of that name.
      turned: rotates [b, t, heads, c.rotated].
      x: what the layer reads.
    """
    b, t, _ = x.shape
    still = c.head_dim - c.rotated
    if c.query_rank:
        q = dense("q_b", c.heads * c.head_dim)(norm("q_a_norm")(dense("q_a", c.query_rank)(x)))
    else:
        q = dense("q", c.heads * c.head_dim)(x)
    q = q.reshape(b, t, c.heads, c.head_dim)
    small, shared = jnp.split(dense("kv_a", c.kv_rank + c.rotated)(x), (c.kv_rank,), axis=-1)
    kv = dense("kv_b", c.heads * (still + c.value_size))(norm("kv_a_norm")(small))
    k, v = jnp.split(kv.reshape(b, t, c.heads, still + c.value_size), (still,), axis=-1)
    shared = jnp.broadcast_to(turned(shared[:, :, None]), (b, t, c.heads, c.rotated))
    q = jnp.concatenate([q[..., :still], turned(q[..., still:])], axis=-1)
    return q, jnp.concatenate([k, shared], axis=-1), v
