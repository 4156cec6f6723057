"""A decoder that is run from any of its blocks on, with some of its parts changed, and told what that cost.

    x_0 = embed(tokens)     x_{i+1} = block_i(x_i)     KL_t = KL(softmax(head(x_L)_t of the floats) || softmax(...))

A change in block i leaves x_0 ... x_i as they are, so that a model of L blocks runs L / 2 of them for a change, on
average. All parts are in memory, in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.evaluate.blocks import Blocks
from qjax.evaluate.network import batch_of, token_values
from qjax.evaluate.perplexity import Windows
from qjax.models.config import DecoderConfig
from qjax.models.parts import batches, embed, run, run_windows

Params = Mapping[str, Any]
"""{part: tree}: "embed", "layers_0" ..., "final_norm" and, where it is not tied, "head"."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one decoder over the same windows.

    Attributes:
      config: the decoder.
      windows: what it reads.
      params: of the float model.
      hidden: what the float model's head reads, f32[windows, scored, dim]; None until `with_baseline`.
      step: windows that pass a block together; None: as many as the judge takes.
    """

    config: DecoderConfig
    windows: Windows
    params: Params
    hidden: np.ndarray | None = None
    step: int | None = None

    @property
    def blocks(self) -> Blocks:
        """The decoder as the judge sees it."""
        return Blocks(self.config)

    @property
    def steps(self) -> list[slice]:
        """Batches of windows."""
        return list(batches(len(self.windows), batch_of(self.windows.context, len(self.windows), self.step)))

    def first(self, params: Params) -> np.ndarray:
        """x_0, f32[windows, context, dim]."""
        table = params["embed"]["embedding"]
        tokens = self.windows.tokens
        return np.concatenate(
            [np.asarray(embed(self.blocks.stages, lambda ids: table[ids], tokens[at])) for at in self.steps]
        )

    def block(self, i: int, params: Params, x: np.ndarray) -> np.ndarray:
        """x_{i+1} of x_i."""
        stages, out = self.blocks.stages, np.empty_like(x)
        run_windows(stages.blocks[i], params[stages.names[i]], x, out, self.steps)
        return out

    def rest(self, i: int, params: Params, x: np.ndarray) -> np.ndarray:
        """What the head reads behind x_i: f32[windows, scored, dim]."""
        stages = self.blocks.stages
        for j in range(i, len(stages.blocks)):
            x = self.block(j, params, x)
        norm = {"final_norm": params["final_norm"]}
        first = self.windows.first
        return np.concatenate([np.asarray(run(stages.norm, norm, x[at]))[:, first:-1] for at in self.steps])

    def with_baseline(self) -> Runs:
        """The same, behind a run of the float model."""
        return dataclasses.replace(self, hidden=self.rest(0, self.params, self.first(self.params)))

    def kl(self, params: Params, hidden: np.ndarray) -> np.ndarray:
        """KL of what the head makes of `hidden` to the float model's, nats, mean of each window: f64[windows]."""
        assert self.hidden is not None
        ends = [self.blocks.scoring(dict(p), self.config.dim) for p in (params, self.params)]
        found = token_values(self.windows.targets, (ends[0], hidden), (ends[1], self.hidden))
        return found["kl"].mean(axis=1, dtype=np.float64)

    def kl_behind(self, i: int, params: Params, x: np.ndarray) -> np.ndarray:
        """`kl` of the model that has x_i in front of block i."""
        return self.kl(params, self.rest(i, params, x))
