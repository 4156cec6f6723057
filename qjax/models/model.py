"""A loaded model: what it is, its weights, its tokenizer.

    logits = Decoder(config)(dense(params), tokens)

The decoder knows nothing of quantization: packed weights are decoded first (`dense_params`), but for those whose inputs
are rounded as well: these run packed, through `lift`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.lifting import lift
from qjax.models.card import Card, stops_of
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.tables import html_table, number, size
from qjax.tensor import dequantize, is_qtensor
from qjax.tokenizer import Tokenizer
from qjax.typing import Array, Float

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder with its weights.

    Attributes:
      config: the architecture.
      params: the flax params tree of `Decoder(config)`; leaves are arrays or QTensors.
      tokenizer: turns text into token ids and back; None where the files brought none.
      card: what else the files said.
    """

    config: DecoderConfig
    params: Params
    tokenizer: Tokenizer | None = None
    card: Card = dataclasses.field(default_factory=Card)

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return stops_of(self.tokenizer, self.card)

    @functools.cached_property
    def dense(self) -> Params:
        """`dense_params` of the params; decoded once, then kept."""
        return dense_params(self.params)

    def part(self, name: str) -> Any:
        """A part of the params, as `qjax.models.parts.Parts` says: float32, decoded at each call."""
        return jax.tree.map(_as_float, self.params[name], is_leaf=is_qtensor)

    def table(self, name: str) -> Callable[[np.ndarray], Any]:
        """Tokens i[n] -> their rows f32[n, dim] of "embed" or "head"; decoded once."""
        (leaf,) = jax.tree.leaves(self.part(name))
        return lambda tokens: leaf[tokens] if name == "embed" else leaf[:, tokens].T

    def logits(self, tokens: Any) -> Float[Array, "batch length vocab"]:
        """Next-token scores at every position, float32, of integers [batch, length].

        Raises:
          UserError: a sequence longer than the context, or a token outside the vocabulary.
        """
        tokens = check_tokens(self.config, tokens)
        return forward(self.config, self.dense, tokens)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(
            "a Model is no function: model.logits(tokens) scores, qjax.generate(model, prompt, n) continues"
        )

    @property
    def _title(self) -> str:
        c, leaves = self.config, jax.tree.leaves(self.params, is_leaf=is_qtensor)
        weights, nbytes = sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)
        return (
            f"{c.family}, {number(weights)} weights, {c.layers} layers of {c.dim}, vocabulary {c.vocab}, "
            f"{8 * nbytes / max(weights, 1):.4g} bits per weight"
        )

    def __repr__(self) -> str:
        try:
            held = ", ".join(f"{name} {number(weights)}" for name, _, weights, _ in formats_held(self.params))
            bare = "" if self.tokenizer is not None else ", no tokenizer"
            return f"Model({self._title}: {held}{bare})"
        except Exception:  # a tree of something else than arrays in place of the params
            return f"Model({self.config.family}, {type(self.params).__name__} of params)"

    def _repr_html_(self) -> str:
        rows = [
            (name, tensors, f"{weights:,}", size(nbytes), f"{8 * nbytes / max(weights, 1):.4g}")
            for name, tensors, weights, nbytes in formats_held(self.params)
        ]
        heads = ("format", "tensors", "weights", "size", "bits")
        return html_table(f"Model: {self._title}", heads, rows, (1, 2, 3, 4))


def formats_held(params: Params) -> list[tuple[str, int, int, int]]:
    """(format, tensors, weights, bytes) of a tree's leaves, the commonest format first."""
    found: dict[str, tuple[int, int, int]] = {}
    for leaf in jax.tree.leaves(params, is_leaf=is_qtensor):
        name = leaf.format.name if is_qtensor(leaf) else jnp.dtype(leaf.dtype).name
        tensors, weights, nbytes = found.get(name, (0, 0, 0))
        found[name] = tensors + 1, weights + leaf.size, nbytes + leaf.nbytes
    return sorted(((name, *held) for name, held in found.items()), key=lambda row: -row[2])


@functools.partial(jax.jit, static_argnames="config")
def forward(config: DecoderConfig, params: Params, tokens: Array) -> Array:
    """Logits of dense params, jitted once per config and shape: f32[batch, length, vocab]."""

    def apply(params: Params, tokens: Array) -> Any:
        return Decoder(config).apply({"params": params}, tokens)

    return Running(apply)(params, tokens)


@dataclasses.dataclass(frozen=True)
class Running:
    """A function of (params, *inputs) for params that may hold packed weights; equal where `apply` is."""

    apply: Callable[..., Any]

    def __call__(self, params: Params, *args: Any) -> Any:
        packed = any(is_qtensor(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_qtensor))
        return (lift(self.apply) if packed else self.apply)(params, *args)


def check_tokens(config: DecoderConfig, tokens: Any) -> Array:
    """Token ids as i32[batch, length], or a UserError where the model cannot read them."""
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise UserError(f"tokens must be integers [batch, length], got {tokens.dtype}{list(tokens.shape)}")
    if tokens.shape[1] > config.context:
        raise UserError(f"{tokens.shape[1]} tokens are more than the model's context of {config.context}")
    if tokens.size and not isinstance(tokens, jax.core.Tracer):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.vocab:
            bad = low if low < 0 else high
            raise UserError(f"token {bad} is outside the model's vocabulary of {config.vocab}")
    return tokens.astype(jnp.int32)


def dense_params(params: Params) -> Params:
    """The same tree with QTensors decoded to float32, but for those that round their inputs; arrays pass through."""

    def dense(leaf: Any) -> Any:
        return dequantize(leaf) if is_qtensor(leaf) and not leaf.rounds_inputs else leaf

    return jax.tree.map(dense, params, is_leaf=is_qtensor)


def _as_float(leaf: Any) -> Any:
    """A leaf in float32, so that every format of one architecture runs the same program; what rounds its inputs stays
    packed."""
    if is_qtensor(leaf):
        return leaf if leaf.rounds_inputs else dequantize(leaf)
    return jnp.asarray(leaf, jnp.float32)
