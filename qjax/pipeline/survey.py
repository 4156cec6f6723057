"""One pass through the float model and back, before anything is rounded: how much the loss minds a token's error.

    L = -log p(y), y drawn from the model's own p          g = dL/d(output)          E[g g^T] = the curvature of KL

Backwards block by block from the stored inputs of every block, so only one block's weights are needed at a time.

    C = E[g g^T], g at the embedded token: an error e in a row of the embedding costs e C e^T
    head = E[(1 - sum_v p_v^2) x x^T]: the same for a row of the head, on the mean row; a tied row pays C + head
    sensitivity = |g|^2 at the output of a weight, token by token: how much each token should count in its H

Sources: Fisher information with labels sampled from the model, as in YAQA (arXiv:2505.22988); token weights:
GuidedQuant (arXiv:2505.07004) with one group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.stages import Stages
from qjax.pipeline.activations import Activations
from qjax.pipeline.head import head_step
from qjax.pipeline.massive import Found, Massive, massive_at, summed
from qjax.pipeline.passes import Load, block_step, checked, embed_step, groups_of, head_weights, run_piece
from qjax.pipeline.windows import Calibration

Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What the float model said.

    Attributes:
      embedding: C, f32[dim, dim].
      head: f32[dim, dim], see the module's docstring.
      tokens: how many the two are means over.
      sensitivity: f32[groups of the block, windows, context] for every block, each group's mean 1.
      head_sensitivity: f32[windows, context].
      alike: bool[blocks, windows, context], the tokens that are massive in front of a block or behind it.
      massive: the channels that make them so.
    """

    embedding: np.ndarray
    head: np.ndarray
    tokens: int
    sensitivity: tuple[np.ndarray, ...]
    head_sensitivity: np.ndarray
    alike: np.ndarray
    massive: tuple[Massive, ...] = ()


def survey(
    stages: Stages,
    load: Load,
    calibration: Calibration,
    folder: Path | None = None,
    notify: Notify = lambda message: None,
) -> Survey:
    """Run the float model forwards and backwards over the calibration windows.

    Args:
      stages: its pieces.
      load: their weights, asked for one piece at a time.
      calibration: the text; the windows that are used make `embedding` and `head`. Labels are drawn by its seed, a
        window's whatever the batch it is in.
      folder: where the inputs of all blocks are kept meanwhile; None: in memory.
      notify: told the name of each piece.

    Raises:
      UserError: NaN or Inf in a weight.
    """
    load, tokens, steps, counted = checked(load), calibration.tokens, calibration.steps, calibration.used
    inputs, found, head_params = _forward(stages, load, calibration, folder, notify)
    dim = stages.dim
    gradient = np.empty((len(tokens), tokens.shape[1], dim), np.float32)
    head = np.zeros((dim, dim), np.float32)
    head_sensitivity = np.empty(tokens.shape, np.float32)
    notify("float model: head, backwards")
    for at in steps:
        windows = jnp.arange(at.start, at.stop)
        g, gram, mass = head_step(stages, head_params, jnp.asarray(inputs[-1].array[at]), windows, calibration.seed)
        gradient[at], head_sensitivity[at] = np.asarray(g), np.asarray(mass)
        if at.start < counted:
            head += np.asarray(gram)
    del head_params
    inputs[-1].drop()
    sensitivity: list[np.ndarray] = []
    for i in reversed(range(len(stages.blocks))):
        notify(f"float model: layers_{i}, backwards")
        params, apply = load(f"layers_{i}"), stages.blocks[i]
        example = jax.ShapeDtypeStruct((1, tokens.shape[1], dim), jnp.float32)
        keys = tuple(tuple(use.key for use in group) for group in groups_of(apply, params, example))
        seen = np.empty((len(keys), *tokens.shape), np.float32)
        for at in steps:
            x, g = jnp.asarray(inputs[i].array[at]), jnp.asarray(gradient[at])
            back, sizes = block_step(apply, keys, params, x, g)
            gradient[at], seen[:, at] = np.asarray(back), np.asarray(sizes)
        inputs[i].drop()
        sensitivity.append(seen / np.maximum(seen[:, :counted].mean(axis=(1, 2), keepdims=True), 1e-30))
    embed = load("embed")
    C = np.zeros((dim, dim), np.float32)
    for at in steps:
        if at.start < counted:
            C += np.asarray(
                embed_step(stages.embed, {"embed": embed}, jnp.asarray(tokens[at]), jnp.asarray(gradient[at]))
            )
    count = counted * tokens.shape[1]
    mean = max(float(head_sensitivity[:counted].mean()), 1e-30)
    alike = np.stack([a.tokens | b.tokens for a, b in pairwise(found)])
    means = C / count, head / count, count
    return Survey(*means, tuple(reversed(sensitivity)), head_sensitivity / mean, alike, summed(found))


def _forward(
    stages: Stages, load: Load, calibration: Calibration, folder: Path | None, notify: Notify
) -> tuple[list[Activations], list[Found], Any]:
    """The inputs of all blocks and of the head, what is massive in each, and the head's weights."""
    tokens, steps = calibration.tokens, calibration.steps
    embed = {"embed": load("embed")}
    shape = (*tokens.shape, stages.dim)
    inputs = [run_piece(stages.embed, embed, tokens, shape, steps, folder, "float_0")]
    found = [massive_at(inputs[0].array)]
    for i, apply in enumerate(stages.blocks):
        notify(f"float model: layers_{i}, float")
        inputs.append(run_piece(apply, load(f"layers_{i}"), inputs[-1].array, shape, steps, folder, f"float_{i + 1}"))
        found.append(massive_at(inputs[-1].array))
    return inputs, found, head_weights(stages, load)
