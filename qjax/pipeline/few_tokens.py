"""Statistics of experts that few tokens were sent to, filled up from all tokens.

    S_e' = (c_e S_e + (n - c_e) S_e(all)) / n          where c_e < n

S_e is over the c_e tokens that the router sends to expert e, S_e(all) over every token as if all were sent there: what
gate and up read is then the pooled input of all experts, and what down reads is the expert's own answer to it. (A pool
over experts is no statistic of down: channel i of one expert has nothing to do with channel i of another.)

The bound n is the number of inputs: a second moment of fewer tokens is singular, and a rounding would move its error
into directions that the expert does see, only not in this text. At n tokens and beyond its own statistics stand. Of
held-out tokens n is taken in the proportion of their windows to the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.stats import Stats

NOTE = "filled up from all tokens"


def are_few(stats: Stats, wanted: float) -> bool:
    """Whether any matrix of a stack saw fewer tokens; a single one is not filled up."""
    counts = np.asarray(0 if stats.count is None else stats.count)
    return counts.ndim > 0 and bool((counts < wanted).any())


def filled(own: Stats, of_all: Stats, wanted: float) -> Stats:
    """Each expert's statistics, those of too few tokens filled up; `count` is what they stand on then.

    Args:
      own: [experts, ...], means over the tokens that each was sent.
      of_all: the same shapes, over every token.
      wanted: n above.
    """
    share = jnp.clip(jnp.asarray(own.count, jnp.float32) / wanted, 0.0, 1.0)
    made: dict[str, Any] = {}
    for kind in own.kinds:
        a, b = getattr(own, kind), getattr(of_all, kind)
        t = share.reshape(share.shape + (1,) * (a.ndim - share.ndim))
        # The largest of all tokens is none smaller than that of some; a sample of them has room for no more.
        made[kind] = jnp.where(t < 1, b, a) if kind in ("absmax", "samples") else t * a + (1 - t) * b
    return dataclasses.replace(own, **made, count=jnp.maximum(jnp.asarray(own.count, jnp.float32), wanted))


def saw_few(counts: np.ndarray, n: int) -> str:
    """Which of a stack, or that a matrix, saw fewer tokens than it has inputs; "" where none did or nobody counted."""
    if not counts.any() or counts.min() >= n:
        return ""
    if counts.ndim == 0:
        return f"saw {int(counts)} tokens, fewer than its {n} inputs"
    few = [at for at in np.ndindex(counts.shape) if counts[at] < n]
    named = ", ".join(f"{'/'.join(map(str, at))} ({int(counts[at])})" for at in few[:8]) + (", ..." if few[8:] else "")
    return f"{len(few)} of {counts.size} matrices saw fewer tokens than their {n} inputs, {named}"
