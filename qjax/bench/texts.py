"""Tokens a second that a model makes, from weights decoded to float32 and from packed ones, in one process, in turn.

    rate = batch (tokens - 2) / (time of the last token - time of the second)      the first two wait for compilers

The first token's time is that of a second text, whose programs are compiled. Operations a token are two a weight, the
head's included; bytes are those of the weights, read once a step.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.bench.clock import roof
from qjax.errors import UserError
from qjax.models.generate import generate_batch
from qjax.models.model import Model
from qjax.models.parts import Packed
from qjax.tensor import is_qtensor

COPIED = 512 << 20  # bytes; hosts of virtual machines have caches that the machine does not tell of
SIDE = 1024


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is timed.

    Attributes:
      prompt: tokens of each prompt, drawn at random.
      tokens: made behind it.
      batch: texts at a time.
      rounds: texts (batches of them) that are timed; the medians count.
      cache: format of keys and values; None: floats.
      dtype: of the arithmetic in blocks: "float32" or "bfloat16".
      seed: of the prompts.
    """

    prompt: int = 16
    tokens: int = 48
    batch: int = 1
    rounds: int = 3
    cache: str | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt, self.batch, self.rounds) < 1 or self.tokens < 4:
            raise UserError("prompt, batch and rounds must be at least 1, and tokens 4")


def contest(model: Model, t: Texts) -> Iterator[dict[str, Any]]:
    """A row for float32 weights and, where some are packed, one for packed ones.

    Returns: rows with `name`, `batch`, `first_token_seconds`, `tokens_per_second`, `weight_bytes`, `same_tokens` (as
      those of float32 weights) and the roofline's columns, of one step.
    """
    top = roof(COPIED, SIDE, jnp.float32, t.rounds)
    ways: dict[str, Any] = {"float32": model}
    leaves = jax.tree.leaves(model.params, is_leaf=is_qtensor)
    if any(is_qtensor(leaf) for leaf in leaves):
        ways["packed"] = Packed(model)
    weights, first = sum(leaf.size for leaf in leaves), None
    prompts = np.random.default_rng(t.seed).integers(0, model.config.vocab, (t.batch, t.prompt))
    for name, parts in ways.items():
        _run(parts, prompts, t)  # compiles
        runs = [_run(parts, prompts, t) for _ in range(t.rounds)]
        seconds = statistics.median(seconds for _, seconds, _ in runs)
        nbytes = 4 * weights if name == "float32" else sum(leaf.nbytes for leaf in leaves)
        first = runs[0][2] if first is None else first
        yield {
            "name": name, "batch": t.batch, "first_token_seconds": statistics.median(first for first, _, _ in runs),
            "tokens_per_second": t.batch / seconds, "weight_bytes": nbytes,
            "same_tokens": bool(np.array_equal(runs[0][2], first)),
            "flops": 2 * weights * t.batch, "bytes": nbytes, "seconds": seconds,
            "peak_flops": top.flops, "peak_bytes": top.bytes,
        }  # fmt: skip


def _run(parts: Any, prompts: np.ndarray, t: Texts) -> tuple[float, float, np.ndarray]:
    """Seconds to the first token, seconds a step behind the second, and all tokens [steps, batch]."""
    clocks, made = [time.perf_counter()], []
    for tokens in generate_batch(parts, prompts, t.tokens, cache=t.cache, dtype=jnp.dtype(t.dtype)):
        clocks.append(time.perf_counter())
        made.append(tokens)
    steps = [after - before for before, after in itertools.pairwise(clocks[2:])]
    return clocks[1] - clocks[0], statistics.mean(steps), np.stack(made)
