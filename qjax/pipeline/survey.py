"""One pass through the float model and back, before anything is rounded: how much the loss minds a token's error.

    L = -log p(y), y drawn from the model's own p          g = dL/d(output)          E[g g^T] = the curvature of KL

Backwards block by block from the stored inputs of every block, so only one block's weights are needed at a time.

    C = E[g g^T], g at the embedded token: an error e in a row of the embedding costs e C e^T
    head = E[(1 - sum_v p_v^2) x x^T]: the same for a row of the head, on the mean row; a tied row pays C + head
    sensitivity = |g|^2 at the output of a weight, token by token: how much each token should count in its H
    G = E[g g^T / |g|] there: how much an error in one of its rows is made better or worse by one in another
    s = the mean of g_i^2 over groups of a weight's rows: how much each token should count in the H of each

Sources: Fisher information with labels sampled from the model, as in YAQA (arXiv:2505.22988); token weights:
GuidedQuant (arXiv:2505.07004), in |g|^2 with one group; G: YAQA, its sketch A.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.devices import each_step
from qjax.models.parts import Parts, batches
from qjax.models.stages import Stages
from qjax.pipeline.activations import Activations
from qjax.pipeline.head import head_step
from qjax.pipeline.massive import Found, Massive, massive_at, summed
from qjax.pipeline.output_curvature import BY_ROWS, OutputCurvature, guided_of, heights_of
from qjax.pipeline.passes import Checked, block_step, embed_step, embedded, groups_of, head_weights, run_piece
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
      outputs: G of the blocks' weights, empty where nobody asked for it.
      by_rows: s of groups of rows, f32[k, windows, context], each group's mean 1, of the weights that are rounded so.
    """

    embedding: np.ndarray
    head: np.ndarray
    tokens: int
    sensitivity: tuple[np.ndarray, ...]
    head_sensitivity: np.ndarray
    alike: np.ndarray
    massive: tuple[Massive, ...] = ()
    outputs: OutputCurvature = dataclasses.field(default_factory=OutputCurvature)
    by_rows: OutputCurvature = dataclasses.field(default_factory=OutputCurvature)


def survey(
    stages: Stages,
    model: Parts,
    calibration: Calibration,
    folder: Path | None = None,
    notify: Notify = lambda message: None,
    two_sided: bool = True,
    guided: Mapping[str, int] = MappingProxyType({}),
) -> Survey:
    """Run the float model forwards and backwards over the calibration windows.

    Args:
      stages: its pieces.
      model: their weights, asked for one piece at a time.
      calibration: the text; the windows that are used make `embedding` and `head`. Labels are drawn by its seed, a
        window's whatever the batch it is in.
      folder: where the inputs of all blocks are kept meanwhile; None: in memory.
      notify: told the name of each piece.
      two_sided: whether G is wanted, of tokens that are used and of those that a recipe with `shrink` holds out.
      guided: {path: in how many groups its rows are to be told apart}.

    Raises:
      UserError: NaN or Inf in a weight.
    """
    parts, tokens, counted = Checked(model), calibration.tokens, calibration.used
    split = calibration.to_shrink().used
    steps = list(batches(len(tokens), calibration.batch, (counted, split)))
    inputs, found = _forward(stages, parts, tokens, steps, folder, notify)
    head_params = head_weights(stages, parts)
    dim = stages.dim
    gradient = np.empty((len(tokens), tokens.shape[1], dim), np.float32)
    head = np.zeros((dim, dim), np.float32)
    head_sensitivity = np.empty(tokens.shape, np.float32)
    notify("float model: head, backwards")
    last = inputs.pop()
    whole, rows = (head_params, calibration.seed), (last.array, np.arange(len(tokens), dtype=np.int32))
    for at, (g, gram, mass) in each_step(_head_step, (stages,), whole, rows, steps):
        gradient[at], head_sensitivity[at] = np.asarray(g), np.asarray(mass)
        if at.start < counted:
            head += np.asarray(gram)
    last.drop()
    del head_params, whole, rows, last
    sensitivity: list[np.ndarray] = []
    outputs = OutputCurvature(folder if two_sided else None)
    by_rows = OutputCurvature(folder if guided else None, BY_ROWS)
    for i in reversed(range(len(stages.blocks))):
        notify(f"float model: layers_{i}, backwards")
        params, apply = parts.part(f"layers_{i}"), stages.blocks[i]
        example = jax.ShapeDtypeStruct((1, tokens.shape[1], dim), jnp.float32)
        groups = groups_of(apply, params, example)
        keys = tuple(tuple(use.key for use in group) for group in groups)
        uses = [use for group in groups for use in group if two_sided and len(use.axes) == 1]
        heights = heights_of(uses, stages.head_dim)
        every = [use for group in groups for use in group]
        parts_of = guided_of(every, f"layers_{i}", guided)
        of_rows = {key: np.empty((k, *tokens.shape), np.float32) for key, k in parts_of}
        seen = np.empty((len(keys), *tokens.shape), np.float32)
        x = inputs.pop()  # the list's own hold on the pages would keep all of them resident
        xg = x.array, gradient
        sums: tuple[dict[str, Any], ...] = {}, {}
        static = apply, keys, heights, parts_of
        for at, (back, sizes, found_G, found_rows) in each_step(block_step, static, (params,), xg, steps):
            gradient[at], seen[:, at] = np.asarray(back), np.asarray(sizes)
            for key, s in found_rows.items():
                of_rows[key][:, at] = np.asarray(s)
            total = sums[int(at.start >= split)]
            total |= {key: total[key] + G if key in total else G for key, G in found_G.items()}
        if uses:
            outputs.put(i, {use.path: _means(use.key, sums, split, tokens.shape) for use in uses})
        if guided:
            by_rows.put(i, {use.path: _mean_one(of_rows[use.key], counted) for use in every if use.key in of_rows})
        x.drop()
        del x, xg, params  # before the next block's are read
        sensitivity.append(_mean_one(seen, counted))
    table = parts.embedding()
    C = np.zeros((dim, dim), np.float32)
    for at in steps:
        if at.start < counted:
            C += np.asarray(
                embed_step(stages.embed, jnp.asarray(table(tokens[at].reshape(-1))), jnp.asarray(gradient[at]))
            )
    count = counted * tokens.shape[1]
    mean = max(float(head_sensitivity[:counted].mean()), 1e-30)
    alike = np.stack([a.tokens | b.tokens for a, b in pairwise(found)])
    means = C / count, head / count, count
    return Survey(*means, tuple(reversed(sensitivity)), head_sensitivity / mean, alike, summed(found), outputs, by_rows)


def _mean_one(of: np.ndarray, counted: int) -> np.ndarray:
    """f32[groups, windows, context], the mean of each 1 over the windows that are used."""
    return of / np.maximum(of[:, :counted].mean(axis=(1, 2), keepdims=True), 1e-30)


def _means(key: str, sums: tuple[dict[str, Any], ...], used: int, shape: tuple[int, ...]) -> np.ndarray:
    """G of used and of held-out tokens, stacked; zeros where there is one window."""
    first, last = sums
    windows, context = shape
    held = np.asarray(last[key]) / (windows - used) if key in last else np.zeros_like(first[key])
    return np.stack([np.asarray(first[key]) / used, held]) / context


def _head_step(stages: Stages, params: Any, seed: Any, x: Any, windows: Any) -> Any:
    return head_step(stages, params, x, windows, seed)


def _forward(
    stages: Stages, parts: Checked, tokens: np.ndarray, steps: list[slice], folder: Path | None, notify: Notify
) -> tuple[list[Activations], list[Found]]:
    """The inputs of all blocks and of the head, and what is massive in each."""
    inputs = [embedded(stages, parts.embedding(), tokens, steps, folder, "float_0")]
    found = [massive_at(inputs[0].array)]
    for i, (name, apply) in enumerate(zip(stages.names, stages.blocks, strict=True)):
        notify(f"float model: {name}, float")
        x = inputs[-1].array
        inputs.append(run_piece(apply, parts.part(name), (x,), x.shape, steps, folder, f"float_{i + 1}"))
        found.append(massive_at(inputs[-1].array))
    return inputs, found
