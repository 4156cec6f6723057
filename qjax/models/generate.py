"""Text generation with a key/value cache: one prefill, then one step per token, block by block.

    t_{n+1} ~ softmax(top_p(top_k(logits(t_0..t_n) / temperature)))            (temperature 0: the argmax)

A block is compiled once per kind of layer and cache size: its shapes do not depend on how far the text has come. Its
weights are decoded to float32 when it runs; of a model that fits into `HELD_BYTES` they are kept from step to step, of
a larger one the last blocks are decoded, or read from their file, at each step.

Prompts are padded to a multiple of 64 tokens and cache sizes likewise, so that few lengths are ever compiled; the
padding lies behind the last real token, where the causal mask hides it until it is overwritten; its positions are -1,
by which linear attention passes it by.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, Cache, empty_cache
from qjax.models.model import Params, Running, check_tokens
from qjax.models.parts import Held, Parts, embed, head_of, run
from qjax.models.stages import stages_of
from qjax.typing import Array, Float, Int

_PAD = 64
HELD_BYTES = 540 << 20  # of float32 weights kept between steps: 140 million


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
    model: Parts,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    stop: Collection[int] = (),
    held_bytes: int = HELD_BYTES,
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    Args:
      model: a Model, or an opened file (`qjax.pipeline.source.open_source`).
      prompt: token ids, with the BOS where the model wants one.
      max_tokens: how many tokens to make at most.
      sampling: greedy by default.
      key: a jax.random key; needed unless sampling is greedy.
      stop: token ids that end the text (the model's EOS); they are not yielded.
      held_bytes: of decoded float32 weights that may be kept between steps; more is faster for a model that needs it.

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
    return _generate(model, np.asarray(tokens), max_tokens, sampling, key, frozenset(stop), held_bytes)


def _generate(model, prompt, max_tokens, sampling, key, stop, held_bytes) -> Iterator[int]:
    n, config = prompt.shape[1], model.config
    cache = empty_cache(config, 1, -(-(n + max_tokens) // _PAD) * _PAD)
    cache.pop("length")
    extend = _extender(model, held_bytes)
    logits = extend(np.pad(prompt, ((0, 0), (0, -n % _PAD))), cache, 0, n - 1)
    for length in range(n, n + max_tokens):
        token = _sample(sampling, logits, key, length)
        current = int(token[0])
        if current in stop:
            return
        yield current
        if length + 1 < n + max_tokens:
            logits = extend(np.asarray(token)[:, None], cache, length, 0)


def _extender(model: Parts, held_bytes: int) -> Callable[[np.ndarray, Cache, int, int], Array]:
    """(tokens, cache, how many it holds, at) -> logits [batch, vocab] of one of the new positions; the cache's layers
    are replaced by longer ones."""
    stages, part, table = stages_of(model.config), Held(model, held_bytes), model.table("embed")
    kinds = [stages.blocks.index(block) for block in stages.blocks]
    step, weights = head_of(model, stages, part, held_bytes // 8)

    def extend(tokens: np.ndarray, cache: Cache, start: int, at: int) -> Array:
        x = embed(stages, table, tokens)
        for name, kind in zip(stages.names, kinds, strict=True):
            x, cache[name] = _block(model.config, kind, part(name), x, cache[name], start, at + 1)
        n = run(stages.norm, {"final_norm": part("final_norm")}, x[:, at : at + 1])[:, 0]
        chunks = [(first, min(step, stages.vocab - first)) for first in range(0, stages.vocab, step)]
        return jnp.concatenate([_scores(model.config, count, weights(s, count), n) for s, count in chunks], axis=-1)

    return extend


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames="cache")
def _block(
    config: DecoderConfig, layer: int, params: Params, x: Array, cache: Any, start: Any, count: Any
) -> tuple[Array, Any]:
    """A layer on `count` positions from `start` on, and its longer cache."""

    def apply(params: Params, x: Array, cache: Any) -> Any:
        places = jnp.arange(x.shape[1], dtype=jnp.int32)
        positions = jnp.where(places < count, start + places, -1)
        return Block(config, layer).apply({"params": params}, x, positions, cache)

    return Running(apply)(params, x, cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(config: DecoderConfig, count: int, weights: Params, n: Array) -> Array:
    """Logits of the tokens whose weights these are."""
    return Running(lambda weights, n: stages_of(config).scores(weights, n, 0, count))(weights, n)


@functools.partial(jax.jit, static_argnums=0)
def _sample(sampling: Sampling, logits: Array, key: Array, length: Any) -> Array:
    """The next token of a text of so many, i32[batch]."""
    return sample(logits, sampling, jax.random.fold_in(key, length))


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
