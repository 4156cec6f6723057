"""The loss of a language model's head and its gradient, without the logits of the whole vocabulary at once.

    z = scores(n)                     for chunks of the vocabulary, twice
    1. log-sum-exp, running:          m' = max(m, max z)      s' = s exp(m - m') + sum exp(z - m')      lse = m + log s
       y ~ p = softmax(z):            argmax of z + Gumbel noise, over the chunks seen so far
    2. dL/dn = (p - onehot(y)) dz/dn  of L = -log p(y)        sum p^2

Memory is that of windows times chunk, whatever the vocabulary; the work is three products with the head instead of two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.compiled import full_float32
from qjax.models.stages import Stages
from qjax.typing import Array, Float, Int

CHUNK = 8192
"""Tokens of the vocabulary at a time. Labels depend on it: noise is drawn chunk by chunk."""
SCORES = 1 << 23  # at a time: 32 MiB, of which a few are alive


@partial(jax.jit, static_argnums=0)
@full_float32
def head_step(
    stages: Stages, params: Any, x: Float[Array, "b t d"], windows: Int[Array, "b"], seed: Array | int
) -> tuple[Float[Array, "b t d"], Float[Array, "d d"], Float[Array, "b t"]]:
    """What the loss says of the head and of its input, with labels drawn from the model.

    Args:
      stages: of the model.
      params: the head's.
      x: the last block's output.
      windows: their numbers, of which with the seed the labels are a function.

    Returns: dL/dx; sum (1 - sum p^2) n n^T with n the head's input; and 1 - sum p^2 token by token.
    """
    n, back = jax.vjp(lambda x: stages.norm(params, x), x)
    chunk = min(CHUNK, stages.vocab)
    keys = jax.vmap(lambda w: jax.random.fold_in(jax.random.key(seed), w))(windows)
    few = max(1, SCORES // (x.shape[1] * chunk))
    dn, squares = lax.map(lambda at: _window(stages, params, *at), (n, keys), batch_size=min(few, len(x)))
    mass = 1.0 - squares
    rows = n.reshape(-1, n.shape[-1])
    gram = lax.dot_general(rows * mass.reshape(-1, 1), rows, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return back(dn)[0], gram, mass


def _window(stages: Stages, params: Any, n: Float[Array, "t d"], key: Array) -> tuple[Array, Array]:
    """dL/dn and sum p^2 of one window's tokens."""
    vocab, chunk = stages.vocab, min(CHUNK, stages.vocab)
    count = -(-vocab // chunk)

    def scores(n: Array, c: Array) -> tuple[Array, Array, Array]:
        """Of chunk c. The last begins early, to be as long; what the one before had does not count."""
        start = jnp.minimum(c * chunk, vocab - chunk)
        tokens = (start + jnp.arange(chunk))[None]
        return stages.scores(params, n, start, chunk), tokens, tokens >= c * chunk

    def draw(carry: Any, c: Array) -> tuple[Any, None]:
        top, total, best, label = carry
        z, tokens, own = scores(n, c)
        z = jnp.where(own, z, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(z, axis=-1))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(z - higher[:, None]), axis=-1)
        noisy = z + jax.random.gumbel(jnp.where(c == 0, key, jax.random.fold_in(key, c)), z.shape, z.dtype)
        at = jnp.argmax(noisy, axis=-1)
        value = jnp.take_along_axis(noisy, at[:, None], axis=-1)[:, 0]
        label = jnp.where(value > best, tokens[0, at], label)
        return (higher, total, jnp.maximum(best, value), label), None

    low = jnp.full(n.shape[0], -jnp.inf, n.dtype)
    begin = (low, jnp.zeros_like(low), low, jnp.zeros(n.shape[0], jnp.int32))
    (top, total, _, label), _ = lax.scan(draw, begin, jnp.arange(count))
    lse = top + jnp.log(total)

    def pull(carry: Any, c: Array) -> tuple[Any, None]:
        dn, squares = carry
        z, back, (tokens, own) = jax.vjp(partial(_with_rest, scores, c), n, has_aux=True)
        p = jnp.where(own, jnp.exp(z - lse[:, None]), 0.0)
        hit = own & (tokens == label[:, None])
        return (dn + back(p - hit.astype(p.dtype))[0], squares + jnp.sum(p * p, axis=-1)), None

    (dn, squares), _ = lax.scan(pull, (jnp.zeros_like(n), jnp.zeros_like(low)), jnp.arange(count))
    return dn, squares


def _with_rest(scores: Any, c: Array, n: Array) -> tuple[Array, Any]:
    z, *rest = scores(n, c)
    return z, rest
