"""The text a model writes itself: what it is calibrated on where no other text is at hand.

    t_0 = BOS        t_{n+1} ~ softmax(logits(t_0 .. t_n) / temperature)        windows side by side, one cache a batch

An end of text is drawn like any other token, and the text goes on behind it. What a model has learned it writes: such a
text serves nearly as well as a real one, and random tokens do not.

Source: LLM-QAT (arXiv:2305.17888), section 3.1; for GPTQ at temperature 0.8: openai/parameter-golf, pull request 1019.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import UserError
from qjax.models.cache import empty_cache
from qjax.models.decoder import Decoder
from qjax.models.generate import Sampling, generate, sample
from qjax.models.model import Model, Running
from qjax.typing import Array

TOKENS = 32_768
"""Tokens that calibrate well enough."""
TEMPERATURE = 0.8
_STEPS = 64  # tokens between two lines of progress


def written(model: Model, prompt: str, count: int) -> str:
    """What a model writes behind a prompt, greedily, with the prompt: files that keep likelihood can fail to speak.

    Args:
      count: tokens behind the prompt, at most.

    Raises:
      UserError: a model without a tokenizer; what `generate` raises.
    """
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer, and a prompt is text: save its tokenizer beside its weights")
    ids = model.tokenizer.encode(prompt, bos=True)
    return model.tokenizer.decode([*ids, *generate(model, ids, count)])


def own_tokens(
    model: Model,
    windows: int,
    context: int,
    seed: int = 0,
    *,
    temperature: float = TEMPERATURE,
    batch: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Windows of tokens drawn from a model.

    Args:
      model: its packed weights are decoded once.
      windows, context: how many, and tokens in each.
      seed: the same seed, the same text, whatever the batch is cut into.
      temperature: divides the logits.
      batch: windows written side by side.
      progress: told (tokens written, of all) now and then.

    Returns: i32[windows, context]; the first of each is the BOS, or the end of a text where there is none, or a token
    drawn from the whole vocabulary where the model has neither.
    """
    keys = jax.random.split(jax.random.key(seed), windows)
    made = np.empty((windows, context), np.int32)
    for at in range(0, windows, batch):
        key = keys[at : at + batch]
        token = _first(model, key)
        made[at : at + batch, 0] = np.asarray(token)
        cache = empty_cache(model.config, len(key), context + _STEPS)  # the last step may write too many
        for start in range(1, context, _STEPS):
            token, cache, drawn = _written(model.config, Sampling(temperature), model.dense, cache, token, key)
            count = min(_STEPS, context - start)
            made[at : at + batch, start : start + count] = np.asarray(drawn).T[:, :count]
            progress(at * context + len(key) * (start + count), windows * context)
    return made


def _first(model: Model, keys: Array) -> Array:
    t = model.tokenizer
    ids = () if t is None else (t.bos, t.eos)
    known = next((i for i in ids if i is not None), None)
    if known is not None:
        return jnp.full(len(keys), known, jnp.int32)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, model.config.vocab))(keys)


@partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def _written(
    config: Any, sampling: Sampling, params: Any, cache: Any, token: Array, keys: Array
) -> tuple[Array, Any, Array]:
    """The next tokens of every window, i32[_STEPS, batch]."""

    decoder = Running(lambda params, tokens, cache: Decoder(config).apply({"params": params}, tokens, cache, at=0))

    def step(state: Any, _: None) -> Any:
        token, cache = state
        logits, longer = decoder(params, token[:, None], cache)
        key = jax.vmap(jax.random.fold_in, (0, None))(keys, longer["length"])
        token = jax.vmap(lambda row, key: sample(row[None], sampling, key)[0])(logits[:, 0], key)
        return (token, longer), token

    (token, cache), drawn = lax.scan(step, (token, cache), None, length=_STEPS)
    return token, cache, drawn
