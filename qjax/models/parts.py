"""A decoder whose weights are asked for a part at a time, so that it need not be in memory as a whole.

    embed | layers_0 | layers_1 | ... | final_norm | head          a tied head is the embedding

    x_0 = embed(tokens)     x_{i+1} = block_i(x_i) of all windows, then the next block: each part is asked for once

A `Model` holds its parts, packed or not; an opened file (`qjax.pipeline.source`) reads them when they are asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compiled import full_float32
from qjax.models.config import DecoderConfig
from qjax.models.devices import each_step
from qjax.models.model import Model, Running
from qjax.models.stages import Apply, Stages
from qjax.prepacking import prepack
from qjax.tokenizer import Tokenizer
from qjax.typing import Array, Float

HEAD_WEIGHTS = 1 << 24  # of the head in memory at a time, where it is read from a file: 64 MiB in float32
Table = Callable[[np.ndarray], Any]


@runtime_checkable
class Parts(Protocol):
    """A decoder in parts: what a `Model` and an opened file have in common."""

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Turns text into token ids and back."""

    def part(self, name: str) -> Any:
        """A part of the params tree ("embed", "layers_3", "final_norm", "head") in float32, but for weights that round
        their inputs, which stay packed."""

    def table(self, name: str) -> Table:
        """Tokens i[n] -> their rows f32[n, dim] of the part "embed" or "head"."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """The parts of a model in memory as they are: what is packed is multiplied with packed (`qjax.dot`), never decoded
    as a whole. A `Model`'s own parts are float32, decoded when they are asked for.
    """

    model: Model

    @property
    def config(self) -> DecoderConfig:
        """See `Parts`."""
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """See `Parts`."""
        return self.model.tokenizer

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return self.model.stops

    def part(self, name: str) -> Any:
        """A part of the params tree, packed leaves and arrays as they are."""
        return self.model.params[name]

    def prepacked(self, rows: int = 1, dtype: Any = jnp.float32) -> Packed:
        """The same model with its weights as the kernels read them that will multiply with them (`qjax.prepack`).

        `generate` does so by itself, beside the arrays that it was given. Where nobody else has those, they are freed.
        The embedding, of which rows are looked up, stays as it is.

        Args:
          rows: of x, as texts of a batch.
          dtype: of the arithmetic in blocks.
        """
        params = {
            name: part if name == "embed" else prepack(part, rows, dtype_of(name, dtype))
            for name, part in self.model.params.items()
        }
        return Packed(dataclasses.replace(self.model, params=params))

    def table(self, name: str) -> Table:
        """See `Parts`: the rows that are looked up are decoded alone."""
        axis, part = 0 if name == "embed" else 1, self.model.params[name]
        return lambda tokens: _rows(axis, part, jnp.asarray(tokens))


def dtype_of(name: str, dtype: Any) -> Any:
    """The type of what a part's matrices meet where blocks compute in `dtype`: the head's is float32."""
    return dtype if name.startswith("layers_") else jnp.float32


@partial(jax.jit, static_argnums=0)
def _rows(axis: int, part: Any, tokens: Array) -> Float[Array, "n dim"]:
    def take(part: Any, tokens: Array) -> Array:
        (w,) = jax.tree.leaves(part)
        return jnp.take(w, tokens, axis=axis).astype(jnp.float32)

    found = Running(take)(part, tokens)
    return found if axis == 0 else found.T


@partial(jax.jit, static_argnums=0)
@full_float32
def run(apply: Callable[..., Any], params: Any, *x: Array | np.ndarray) -> Any:
    """apply(params, *x), compiled once a shape; params may hold packed weights."""
    return Running(apply)(params, *x)


def batches(count: int, size: int, stops: tuple[int, ...] = ()) -> Iterator[slice]:
    """Slices of at most `size` that cover 0..count and end at every stop."""
    at = 0
    for stop in (*sorted(s for s in stops if 0 < s < count), count):
        while at < stop:
            yield slice(at, min(at + size, stop))
            at = min(at + size, stop)


def run_windows(apply: Apply, params: Any, x: np.ndarray, out: np.ndarray, steps: Sequence[slice]) -> None:
    """out = apply(params, x) of all windows, a step of them on each device; `out` may be `x` itself."""
    for at, y in each_step(run, (apply,), (params,), (x,), steps):
        out[at] = np.asarray(y)


def embed(stages: Stages, table: Table, tokens: np.ndarray) -> Float[Array, "b t d"]:
    """What the first block reads of tokens i[b, t]: their rows of the embedding alone are looked at."""
    rows = jnp.asarray(table(np.asarray(tokens).reshape(-1)))
    places = np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)
    return run(stages.embed, {"embed": {"embedding": rows}}, places)


Head = tuple[int, Callable[[int, int], Any]]
"""Tokens of the vocabulary whose scores are made at a time; (start, count) -> what `stages.scores` takes for them."""


def head_of(parts: Parts, stages: Stages, part: Callable[[str], Any] | None = None, small: int | None = None) -> Head:
    """The weights of the head: whole where the model is in memory or the head small, else so many rows at a time.

    Args:
      parts: the model.
      stages: of it.
      part: in place of `parts.part`.
      small: weights of a head that is asked for whole; None: HEAD_WEIGHTS.
    """
    name = "embed" if stages.tied else "head"
    if isinstance(parts, Model | Packed) or stages.vocab * stages.dim <= (HEAD_WEIGHTS if small is None else small):
        whole = {name: (part or parts.part)(name)}
        return stages.vocab, lambda start, count: whole
    table = parts.table(name)

    def rows(start: int, count: int) -> dict[str, Any]:
        found = jnp.asarray(table(np.arange(start, start + count)))
        return {"embed": {"embedding": found}} if stages.tied else {"head": {"kernel": found.T}}

    return max(1, HEAD_WEIGHTS // stages.dim), rows


class Held:
    """Parts of a model as `ready(name, part)` makes them; those asked for first are kept, as long as they fit."""

    def __init__(self, parts: Parts, nbytes: float | int, ready: Callable[[str, Any], Any] = lambda name, part: part):
        self._parts, self._left, self._ready = parts, nbytes, ready
        self._kept: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name in self._kept:
            return self._kept[name]
        part = self._ready(name, self._parts.part(name))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(part))
        if size <= self._left:
            self._kept[name], self._left = part, self._left - size
        return part
