"""A decoder judged a part at a time: all windows through one block, then through the next, then by chunks of the head.

    x = embed(tokens)      for each block: x = block(x)      n = norm(x) where it is scored      z = n W_head[chunk]^T

In memory are one part's weights in float32 and a few windows; the residual stream of all windows lies in a temporary
file, as many of them at a time as fit there. Each part is asked for once for each such round.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any

import numpy as np

from qjax.compiled import full_float32
from qjax.evaluate.network import Params, Progress, Scoring
from qjax.io.space import scratch
from qjax.models.config import DecoderConfig
from qjax.models.model import Model, Running
from qjax.models.parts import Parts, batches, embed, head_of, run, run_windows
from qjax.models.stages import Stages, stages_of
from qjax.typing import Array

STREAM_BYTES = 4 << 30  # of temporary disk for the residual stream
_SMALL = 1 << 26  # bytes that stay in memory


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A decoder as `qjax.evaluate.network.Reader` describes it; its params are `Parts`, or a params tree."""

    config: DecoderConfig

    @property
    def stages(self) -> Stages:
        """Its pieces."""
        return stages_of(self.config)

    def at_once(self, context: int, batch: int) -> int:
        """See `Reader`."""
        return max(batch, STREAM_BYTES // (4 * context * self.config.dim))

    def width(self, params: Params, context: int) -> int:
        """See `Reader`."""
        return self.config.dim

    def read(self, params: Params, tokens: np.ndarray, first: int, batch: int, progress: Progress) -> np.ndarray:
        """See `Reader`."""
        parts, stages, total = self._parts(params), self.stages, len(tokens)
        spare = -total % batch  # one program serves all
        x = _room((total + spare, tokens.shape[1], self.config.dim))
        steps = list(batches(len(x), batch))
        table, padded = parts.table("embed"), np.pad(tokens, ((0, spare), (0, 0)))
        for at in steps:
            x[at] = np.asarray(embed(stages, table, padded[at]))
        del table
        pieces = len(stages.blocks) + 1
        for i, (name, block) in enumerate(zip(stages.names, stages.blocks, strict=True)):
            run_windows(block, parts.part(name), x, x, steps)
            progress(total * (i + 1) // pieces, total)
        hidden, norm = _room((total, tokens.shape[1] - 1 - first, self.config.dim)), parts.part("final_norm")
        for at in steps:
            kept = hidden[at]
            kept[:] = np.asarray(run(stages.norm, {"final_norm": norm}, x[at]))[: len(kept), first:-1]
        progress(total, total)
        return hidden

    def scoring(self, params: Params, width: int) -> Scoring:
        """See `Reader`."""
        step, weights = head_of(self._parts(params), self.stages)
        return Scoring(self, self.stages.vocab, step, weights)

    @full_float32
    def scores(self, weights: Any, n: Array, start: Any, count: int) -> Array:
        """The logits of some tokens; `weights` are the head's, or those of these tokens alone."""
        return Running(partial(_scores, self.stages, start, count))(weights, n)

    def _parts(self, params: Params) -> Parts:
        return params if hasattr(params, "part") else Model(self.config, params)


@lru_cache(maxsize=64)
def network_of_decoder(config: DecoderConfig) -> Blocks:
    """The decoder of a config in float32. Equal configs give the same compiled programs."""
    return Blocks(config)


def _scores(stages: Stages, start: Any, count: int, weights: Any, n: Array) -> Array:
    return stages.scores(weights, n, start, count)


def _room(shape: tuple[int, ...]) -> np.ndarray:
    """An empty f32 array: in a temporary file where it is large."""
    return np.empty(shape, np.float32) if 4 * int(np.prod(shape)) <= _SMALL else scratch(np.float32, shape)
