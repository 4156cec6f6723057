"""Text generation with a key/value cache: one prefill, then one step per token, block by block.

    t_{n+1} ~ logits(t_0..t_n)                              (sampling.py)

A block is compiled once per kind of layer and cache size: its shapes do not depend on how far the text has come. Its
weights are decoded to float32 when it runs; of a model that fits into `HELD_BYTES` they are kept from step to step, of
a larger one the last blocks are decoded, or read from their file, at each step. Those of `Packed(model)` stay packed,
prepacked once where a kernel has a layout of its own (`Packed.prepacked`).

Prompts are padded to a multiple of 64 tokens and cache sizes likewise, so that few lengths are ever compiled; the
padding lies behind the last real token, where the causal mask hides it until it is overwritten; its positions are -1,
by which linear attention passes it by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.models.cache import Cache, empty_cache
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block
from qjax.models.model import Params, Running, check_tokens
from qjax.models.parts import Held, Packed, Parts, dtype_of, embed, head_of, run
from qjax.models.sampling import GREEDY, Sampling, sample
from qjax.models.stages import stages_of
from qjax.prepacking import prepack
from qjax.typing import Array

ENDED = -1  # in place of a token, where a text of a batch has ended
Extend = Callable[[np.ndarray, Cache, int, int], Array]
"""(tokens [batch, t], cache, how many it holds, at) -> logits [batch, vocab] of one of the new positions; the cache's
layers are replaced by longer ones."""

_PAD = 64
HELD_BYTES = 540 << 20  # of weights kept between steps: 140 million in float32


def generate(
    model: Parts,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    stop: Collection[int] = (),
    held_bytes: int = HELD_BYTES,
    cache: str | Format | None = None,
    dtype: Any = jnp.float32,
) -> Iterator[int]:
    """Continue a prompt, one token at a time.

    Args:
      model: a Model, or an opened file (`qjax.pipeline.source.open_source`): their weights are decoded to float32. In
        `Packed(model)` they are multiplied with as they are.
      prompt: token ids, with the BOS where the model wants one.
      max_tokens: how many tokens to make at most.
      sampling: greedy by default.
      key: a jax.random key; needed unless sampling is greedy.
      stop: token ids that end the text (the model's EOS); they are not yielded.
      held_bytes: of weights that may be kept between steps; more is faster for a model that needs it. Packed ones are
        kept.
      cache: a format for keys and values, such as "Q8_0"; None: floats.
      dtype: of the arithmetic in blocks, and of those floats; the head's is float32.

    Returns: an iterator over the new token ids, each as soon as it is known.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, prompt and new tokens longer than the context,
        sampling without a key, or a format that the heads cannot be packed in. Raised by the call itself, before the
        first token is asked for.
    """
    prompts = np.asarray(prompt, np.int32)[None]
    rows = generate_batch(model, prompts, max_tokens, sampling, key, stop, held_bytes, cache, dtype)
    return (int(tokens[0]) for tokens in rows)


def generate_batch(
    model: Parts,
    prompts: np.ndarray | Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    stop: Collection[int] = (),
    held_bytes: int = HELD_BYTES,
    cache: str | Format | None = None,
    dtype: Any = jnp.float32,
) -> Iterator[np.ndarray]:
    """Continue several prompts of one length together; arguments and errors as of `generate`.

    Args:
      prompts: token ids, i[batch, length].

    Returns: an iterator over the next tokens i32[batch], ENDED where a text has ended; it stops where all have.
    """
    prompts = _as_rows(prompts)
    config, n = model.config, prompts.shape[1]
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
    tokens = np.asarray(check_tokens(config, prompts))
    key = jax.random.key(0) if key is None else key  # greedy sampling does not look at it
    room = empty_cache(config, len(tokens), -(-(n + max_tokens) // _PAD) * _PAD, dtype, cache)
    room.pop("length")
    extend = _extender(model, held_bytes, len(tokens), dtype)
    return _continued(extend, tokens, room, max_tokens, sampling, key, frozenset(stop))


def _as_rows(prompts: Any) -> np.ndarray:
    wanted = "prompts must be token ids [batch, length], all of one length: group texts by their length"
    try:
        rows = np.asarray(prompts, np.int32)
    except ValueError:  # of several lengths
        raise UserError(wanted) from None
    if rows.ndim != 2 or len(rows) == 0:
        raise UserError(wanted)
    return rows


def _continued(extend: Extend, prompts, cache, max_tokens, sampling, key, stop) -> Iterator[np.ndarray]:
    n = prompts.shape[1]
    logits = extend(np.pad(prompts, ((0, 0), (0, -n % _PAD))), cache, 0, n - 1)
    ended = np.zeros(len(prompts), bool)
    for length in range(n, n + max_tokens):
        tokens = np.asarray(_sample(sampling, logits, key, length))
        ended = ended | np.isin(tokens, list(stop))
        if ended.all():
            return
        yield np.where(ended, ENDED, tokens)
        if length + 1 < n + max_tokens:
            logits = extend(tokens[:, None], cache, length, 0)


def _extender(model: Parts, held_bytes: int, batch: int, dtype: Any) -> Extend:
    stages, table = stages_of(model.config), model.table("embed")
    held: float | int = math.inf if isinstance(model, Packed) else held_bytes
    part = Held(model, held, lambda name, part: prepack(part, batch, dtype_of(name, dtype)))
    kinds = [stages.blocks.index(block) for block in stages.blocks]
    step, weights = head_of(model, stages, part, held_bytes // 8)

    def extend(tokens: np.ndarray, cache: Cache, start: int, at: int) -> Array:
        x = embed(stages, table, tokens).astype(dtype)
        for name, kind in zip(stages.names, kinds, strict=True):
            x, cache[name] = _block(model.config, kind, dtype, part(name), x, cache[name], start, at + 1)
        n = run(stages.norm, {"final_norm": part("final_norm")}, x[:, at : at + 1].astype(jnp.float32))[:, 0]
        chunks = [(first, min(step, stages.vocab - first)) for first in range(0, stages.vocab, step)]
        return jnp.concatenate([_scores(model.config, count, weights(s, count), n) for s, count in chunks], axis=-1)

    return extend


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="cache")
def _block(
    config: DecoderConfig, layer: int, dtype: Any, params: Params, x: Array, cache: Any, start: Any, count: Any
) -> tuple[Array, Any]:
    """A layer on `count` positions from `start` on, and its longer cache."""

    def apply(params: Params, x: Array, cache: Any) -> Any:
        places = jnp.arange(x.shape[1], dtype=jnp.int32)
        positions = jnp.where(places < count, start + places, -1)
        return Block(config, layer, dtype).apply({"params": params}, x, positions, cache)

    return Running(apply)(params, x, cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(config: DecoderConfig, count: int, weights: Params, n: Array) -> Array:
    """Logits of the tokens whose weights these are."""
    return Running(lambda weights, n: stages_of(config).scores(weights, n, 0, count))(weights, n)


@functools.partial(jax.jit, static_argnums=0)
def _sample(sampling: Sampling, logits: Array, key: Array, length: Any) -> Array:
    """The next token of a text of so many, i32[batch]."""
    return sample(logits, sampling, jax.random.fold_in(key, length))
