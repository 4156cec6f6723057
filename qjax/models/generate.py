"""Text generation with a key/value cache: one prefill, then one jitted step per token.

    t_{n+1} ~ softmax(top_p(top_k(logits(t_0..t_n) / temperature)))            (temperature 0: the argmax)

The step is compiled once per model, cache size and Sampling: its shapes do not depend on how far the text has come.
Prompts are padded to a multiple of 64 tokens and cache sizes likewise, so that few lengths are ever compiled; the
padding lies behind the last real token, where the causal mask hides it until it is overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Cache, Decoder, empty_cache
from qjax.models.model import Model, Params, Running, check_tokens
from qjax.typing import Array, Float, Int

_PAD = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token and ignores the rest.
      top_k: only the k most likely tokens; None: all.
      top_p: only the smallest set of most likely tokens whose probability reaches p; None: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is negative")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must lie in (0, 1]")


GREEDY = Sampling()


def generate(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    Args:
      model: its packed weights are decoded once, at the first call.
      prompt: token ids, with the BOS where the model wants one.
      max_tokens: how many tokens to make at most.
      sampling: greedy by default.
      key: a jax.random key; needed unless sampling is greedy.
      stop: token ids that end the text (the model's EOS); they are not yielded.

    Returns: an iterator over the new token ids, each as soon as it is known.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, prompt and new tokens longer than the context, or
        sampling without a key. Raised by the call itself, before the first token is asked for.
    """
    config, n = model.config, len(prompt)
    if n == 0:
        raise UserError("the prompt is empty; give at least one token (the BOS)")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; expected at least 1")
    if n + max_tokens > config.context:
        room = config.context - n
        fits = f"ask for at most {room}" if room > 0 else "shorten the prompt"
        raise UserError(
            f"a prompt of {n} tokens and {max_tokens} new ones exceed the model's context of {config.context}; {fits}"
        )
    if sampling.temperature > 0 and key is None:
        raise UserError("sampling with a temperature needs a key (a seed)")
    tokens = check_tokens(config, np.asarray(prompt, np.int32)[None, :])
    key = jax.random.key(0) if key is None else key  # greedy sampling does not look at it
    return _generate(config, model.dense, tokens, max_tokens, sampling, key, frozenset(stop))


def _generate(config, params, tokens, max_tokens, sampling, key, stop) -> Iterator[int]:
    n = tokens.shape[1]
    capacity = -(-(n + max_tokens) // _PAD) * _PAD
    padded = jnp.pad(tokens, ((0, 0), (0, -n % _PAD)))
    cache = empty_cache(config, 1, capacity)
    token, cache = _prefill(config, sampling, params, cache, padded, jnp.int32(n), key)
    for made in range(1, max_tokens + 1):
        current = int(token[0])
        if current in stop:
            return
        yield current
        if made < max_tokens:
            token, cache = _step(config, sampling, params, cache, token, key)


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def _prefill(
    config: DecoderConfig, sampling: Sampling, params: Params, cache: Cache, tokens: Array, n: Array, key: Array
) -> tuple[Array, Cache]:
    """Read the padded prompt, of which n tokens are real; the first new token, i32[batch], and the filled cache."""
    logits, filled = _extend(config, params, tokens, cache, n - 1)
    return sample(logits, sampling, jax.random.fold_in(key, n)), filled | {"length": n}


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def _step(
    config: DecoderConfig, sampling: Sampling, params: Params, cache: Cache, token: Array, key: Array
) -> tuple[Array, Cache]:
    return next_token(config, sampling, params, cache, token, key)


def next_token(
    config: DecoderConfig, sampling: Sampling, params: Params, cache: Cache, token: Array, key: Array
) -> tuple[Array, Cache]:
    """Append one token a row, i32[batch], to the cache and draw the next; key is one for all rows, or one a row."""
    logits, longer = _extend(config, params, token[:, None], cache, 0)
    if key.ndim == 0:
        return sample(logits, sampling, jax.random.fold_in(key, longer["length"])), longer
    keys = jax.vmap(jax.random.fold_in, (0, None))(key, longer["length"])
    return jax.vmap(lambda row, key: sample(row[None], sampling, key)[0])(logits, keys), longer


def _extend(config: DecoderConfig, params: Params, tokens: Array, cache: Cache, at: Any) -> tuple[Array, Cache]:
    """Logits [batch, vocab] of one of the new positions, and the longer cache."""

    def apply(params: Params, tokens: Array, cache: Cache) -> Any:
        return Decoder(config).apply({"params": params}, tokens, cache, at=at)

    logits, longer = Running(apply)(params, tokens, cache)
    return logits[:, 0], longer


def sample(logits: Float[Array, "batch vocab"], sampling: Sampling, key: Array) -> Int[Array, "batch"]:
    """Draw one token per row; top-k before top-p, both after the temperature."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)
    vocab = logits.shape[-1]
    values, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    if sampling.top_p is not None:
        p = jax.nn.softmax(values, axis=-1)
        reached = jnp.cumsum(p, axis=-1) - p  # by the more likely tokens alone
        values = jnp.where(reached < sampling.top_p, values, -jnp.inf)
    choice = jax.random.categorical(key, values, axis=-1)
    return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
