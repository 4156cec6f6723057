"""How the next token is drawn.

    t ~ softmax(top_p(top_k(logits / temperature)))            (temperature 0: the argmax)

Source of top-p: Holtzman et al., arXiv:1904.09751, section 3.1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.typing import Array, Float, Int


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
