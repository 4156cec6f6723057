"""A language model as the judge sees it: it reads windows up to its head, and its head scores the vocabulary.

    read(params, tokens) -> hidden f32[windows, scored, d]       scores(weights, n, start, count) -> f32[n, count]

Two are alike in that: any function of (params, tokens), which gives all logits at once, a few windows at a time; and a
decoder (`qjax.evaluate.blocks`), which reads all windows block by block and is scored a chunk of its vocabulary at a
time. What is kept of a token is its few scalars.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.evaluate import vocabulary as v
from qjax.evaluate.vocabulary import nothing_apart, nothing_seen
from qjax.typing import Array, Float, Int

Params = Any
Progress = Callable[[int, int], None]

MICRO_BATCH_TOKENS = 2048  # tokens in flight unless the caller gives a batch
HEAD_ELEMENTS = 1 << 23  # positions times vocabulary whose logits exist at once: 32 MiB in float32


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """The end of a model.

    Attributes:
      reader: whose `scores` make the logits.
      vocab: tokens.
      step: of which so many are scored at a time, at most.
      weights: (start, count) -> what `scores` takes for them.
    """

    reader: Reader
    vocab: int
    step: int
    weights: Callable[[int, int], Any]


@runtime_checkable
class Reader(Protocol):
    """What reads windows: a `Network`, or the `Blocks` of a decoder."""

    def at_once(self, context: int, batch: int) -> int:
        """Of how many windows the hidden states are kept."""

    def width(self, params: Params, context: int) -> int:
        """d, what the head reads of a position."""

    def read(self, params: Params, tokens: np.ndarray, first: int, batch: int, progress: Progress) -> np.ndarray:
        """What the head reads at the positions first .. context - 2 of i32[windows, context]: f32[windows, scored, d].

        `batch` windows go at a time; `progress` is told how many are done.
        """

    def scoring(self, params: Params, width: int) -> Scoring:
        """The rest."""

    def scores(self, weights: Any, n: Array, start: Any, count: int) -> Array:
        """Of n f32[m, d]: the logits f32[m, count] of `count` tokens from `start` on."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A language model cut where the logits are made, so that they can be made for a few positions at a time.

    Attributes:
      trunk: (params, i32[b, t]) -> [b, t, d], anything the head reads.
      head: (params, [n, d]) -> logits [n, vocab].
    """

    trunk: Callable[[Params, Array], Array]
    head: Callable[[Params, Array], Array]

    def at_once(self, context: int, batch: int) -> int:
        """See `Reader`."""
        return batch

    def width(self, params: Params, context: int) -> int:
        """See `Reader`."""
        return jax.eval_shape(self.trunk, params, jax.ShapeDtypeStruct((1, context), jnp.int32)).shape[-1]

    def read(self, params: Params, tokens: np.ndarray, first: int, batch: int, progress: Progress) -> np.ndarray:
        """See `Reader`."""
        found = []
        for at in range(0, len(tokens), batch):
            some = tokens[at : at + batch]
            padded = np.pad(some, ((0, batch - len(some)), (0, 0)))  # one program serves all
            found.append(np.asarray(run_trunk(self, params, padded, first))[: len(some)])
            progress(at + len(some), len(tokens))
        return np.concatenate(found)

    def scoring(self, params: Params, width: int) -> Scoring:
        """See `Reader`."""
        one = jax.ShapeDtypeStruct((1, width), jnp.float32)
        vocab = jax.eval_shape(self.head, params, one).shape[-1]
        return Scoring(self, vocab, vocab, lambda start, count: params)

    def scores(self, params: Params, n: Array, start: Any, count: int) -> Array:
        """The logits of all tokens."""
        return self.head(params, n)


@lru_cache(maxsize=64)
def network_of_apply(apply: Callable[[Params, Array], Array]) -> Network:
    """Any function (params, tokens [b, t]) -> logits [b, t, vocab]. Its logits exist for a whole micro-batch."""
    return Network(apply, lambda params, logits: logits)


@partial(jax.jit, static_argnums=(0, 3))
def run_trunk(network: Network, params: Params, tokens: Int[Array, "b t"], first: int) -> Array:
    """What the head needs of the scored positions: [b, t - 1 - first, d]."""
    return network.trunk(params, tokens)[:, first:-1].astype(jnp.float32)


def as_reader(network: Any) -> Any:
    """What reads passes through; a function (params, tokens) -> logits becomes a Network."""
    return network if hasattr(network, "read") else network_of_apply(network)


def batch_of(context: int, windows: int, batch: int | None) -> int:
    """Windows a step; None: about 2048 tokens."""
    batch = max(1, MICRO_BATCH_TOKENS // context) if batch is None else batch
    if batch < 1:
        raise UserError(f"a batch of {batch} windows; it must be at least 1")
    return min(batch, windows)


def token_values(
    targets: np.ndarray, model: tuple[Scoring, np.ndarray], base: tuple[Scoring, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """What the scores say of every position, a bounded number of them at a time.

    Args:
      targets: the true tokens i32[windows, scored].
      model: its end, and what that reads, f32[windows, scored, d].
      base: the same of the model it is compared with.

    Returns: {"nll", "top": 1 where the true token is the most probable} and, with a base, {"nll_base", "kl",
      "same_top"}, each f32[windows, scored].

    Raises:
      UserError: two vocabularies.
    """
    ends, states = zip(*((model,) if base is None else (model, base)), strict=True)
    vocab = ends[0].vocab
    if ends[-1].vocab != vocab:
        raise UserError(f"the model has {vocab} tokens and its baseline {ends[-1].vocab}; they must share a vocabulary")
    count = -(-vocab // max(e.step for e in ends))
    step, total = -(-vocab // count), targets.size
    size = min(total, max(1, HEAD_ELEMENTS // step))
    flat, true = [h.reshape(total, h.shape[-1]) for h in states], targets.reshape(-1)
    tallies: list[Any] = [_begin(size, len(ends)) for _ in range(0, total, size)]
    for c in range(count):
        start = min(c * step, vocab - step)  # the last chunk begins early, to be as long
        weights, readers = tuple(e.weights(start, step) for e in ends), tuple(e.reader for e in ends)
        for i, at in enumerate(range(0, total, size)):
            some = [np.asarray(a[at : at + size]) for a in (*flat, true)]
            *n, target = (np.pad(a, ((0, size - len(a)), *((0, 0),) * (a.ndim - 1))) for a in some)
            tallies[i] = _tally(readers, step, weights, tuple(n), target, start, c * step, tallies[i])
    parts = [
        jax.tree.map(np.asarray, _settled(t, np.pad(true[at : at + size], (0, max(0, at + size - total)))))
        for t, at in zip(tallies, range(0, total, size), strict=True)
    ]
    return {k: np.concatenate([p[k] for p in parts])[:total].reshape(targets.shape) for k in parts[0]}


def _begin(n: int, models: int) -> Any:
    return tuple(nothing_seen(n) for _ in range(models)), nothing_apart(n)


@partial(jax.jit, static_argnums=(0, 1))
def _tally(
    readers: Any, step: int, weights: Any, n: Any, target: Int[Array, "m"], start: Any, own: Any, before: Any
) -> Any:
    """With one more chunk of the vocabulary, from `start` on; tokens before `own` have been counted."""
    seen, apart = before
    tokens = start + jnp.arange(step, dtype=jnp.int32)
    z = [
        jnp.where(tokens[None] >= own, r.scores(w, x, start, step).astype(jnp.float32), -jnp.inf)
        for r, w, x in zip(readers, weights, n, strict=True)
    ]
    if len(z) == 2:
        apart = v.part(apart, seen[1], z[1], z[0])
    return tuple(v.see(s, y, tokens, target) for s, y in zip(seen, z, strict=True)), apart


@jax.jit
def _settled(tally: Any, target: Int[Array, "m"]) -> dict[str, Float[Array, "m"]]:
    (seen, *base), apart = tally
    found = {"nll": v.nll(seen), "top": (seen.best == target).astype(jnp.float32)}
    if base:
        same = (seen.best == base[0].best).astype(jnp.float32)
        found |= {"nll_base": v.nll(base[0]), "kl": v.kl(base[0], seen, apart), "same_top": same}
    return found
