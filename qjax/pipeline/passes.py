"""What is done to one piece of a decoder with all windows: run it, look at an input of it, go through it backwards.

Each is one program a shape, whatever the layer; weights come in, a piece at a time, and leave again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calibrate import add, check_stats, means, sums
from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.lifting import Use, report, tap, tap_shapes, watch
from qjax.models.devices import each_step
from qjax.models.parts import Parts, Table, embed, run_windows
from qjax.models.stages import Apply, Stages
from qjax.pipeline.activations import Activations, Streams, Writer
from qjax.pipeline.encode import check_finite
from qjax.pipeline.windows import Calibration
from qjax.stats import Stats
from qjax.typing import Array


class Checked:
    """The same model, its weights looked through for NaN and Inf when they are first asked for: what is broken is named
    before it has spread into activations and gradients."""

    def __init__(self, parts: Parts):
        self._parts = parts
        self._seen: set[str] = set()

    def part(self, name: str) -> Any:
        """See `Parts`."""
        part = self._parts.part(name)
        if name not in self._seen:
            check_finite(part, f"{name}/")
            self._seen.add(name)
        return part

    def embedding(self) -> Table:
        """Rows of the embedding by token."""
        table = self._parts.table("embed")

        def rows(tokens: np.ndarray) -> Any:
            found = table(tokens)
            check_finite({"embedding": found}, "embed/")
            return found

        return rows


def groups_of(apply: Apply, params: Any, x: Any) -> tuple[tuple[Use, ...], ...]:
    """The contractions of a piece in the order of execution, those with the same input together."""
    found: dict[int, list[Use]] = {}
    for use in report(apply, params, x):
        if use.kind == "dot":
            found.setdefault(use.source, []).append(use)
    return tuple(tuple(uses) for uses in found.values())


def head_weights(stages: Stages, parts: Checked) -> dict[str, Any]:
    """What `stages.head` needs."""
    name = "embed" if stages.tied else "head"
    return {"final_norm": parts.part("final_norm"), name: parts.part(name)}


def run_piece(
    apply: Apply, params: Any, x: np.ndarray, shape: tuple[int, ...], steps: list[slice], folder: Path | None, name: str
) -> Activations:
    """apply(params, x) of all windows, stored."""
    out = Writer(folder, name, shape)
    run_windows(apply, params, x, out.array, steps)
    return out.done()


def embedded(
    stages: Stages, table: Table, tokens: np.ndarray, steps: list[slice], folder: Path | None, name: str
) -> Activations:
    """What the first block reads of all windows, stored; of the embedding, only their rows are in memory."""
    out = Writer(folder, name, (*tokens.shape, stages.dim))
    for at in steps:
        out.array[at] = np.asarray(embed(stages, table, tokens[at]))
    return out.done()


def observe_input(
    calibration: Calibration,
    kinds: tuple[str, ...],
    apply: Apply,
    source: int,
    params: Any,
    floats: Any,
    streams: Streams,
    weight: np.ndarray | None,
    name: str,
) -> tuple[Stats, Stats | None]:
    """Means at one input over the windows that are used, and over those held out."""
    totals: list[Stats | None] = [None, None]
    x_float = None if streams.x_float is None else streams.x_float.array
    whole, rows = (params, None if x_float is None else floats), (streams.x.array, x_float, weight)
    for at, part in each_step(_observe_step, (apply, source, kinds), whole, rows, calibration.steps):
        which = int(at.start >= calibration.used)
        before = totals[which]
        totals[which] = part if before is None else add(before, part)
    used, held = totals
    assert used is not None
    stats = means(used)
    if not float(used.count if used.count is not None else 1):  # tokens pass every block of a decoder
        raise UserError(f"{name}: its input is zero at every token; the model's weights in front of it are all zeros")
    check_stats(stats, name)
    return stats, None if held is None else means(held)


def tempered(sensitivity: np.ndarray, power: float, counted: int) -> np.ndarray:
    """How much each token counts: its sensitivity to a power.

    Below 1 the first position of a window counts as the mean of the others: what a model does there is the same in
    every window, and says nothing of the text.

    Args:
      sensitivity: f32[windows, context].
      power: 1 leaves it as it is.
      counted: the windows over which the mean is 1.
    """
    if power == 1:
        return sensitivity
    made = sensitivity.astype(np.float64) ** power
    if made.shape[1] > 1:
        made[:, 0] = made[:counted, 1:].mean()
    return (made / max(made[:counted].mean(), 1e-30)).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_float32
def _observe_step(
    apply: Apply,
    source: int,
    kinds: tuple[str, ...],
    params: Any,
    floats: Any,
    x: Array,
    x_float: Array | None,
    weight: Array | None,
) -> Stats:
    """The sums of one source for one batch; what lies behind it is dead code."""

    def inputs(params: Any, x: Array) -> Array:
        return watch(apply, lambda use, v: v if use.source == source else None)(params, x)[1][source]

    there = None if x_float is None else inputs(floats, x_float)
    return sums(inputs(params, x), kinds, there, weight)


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def block_step(apply: Apply, keys: tuple[tuple[str, ...], ...], params: Any, x: Array, g: Array) -> tuple[Array, Array]:
    """dL/dx, and |dL/dy|^2 of each group of weights, token by token: f32[groups, b, t]."""
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, x).items()}
    _, back = jax.vjp(lambda taps, x: tap(apply)(params, taps, x), taps, x)
    by_output, by_input = back(g)
    sizes = [sum(jnp.sum(jnp.square(by_output[k]), axis=-1) for k in group) for group in keys]
    return by_input, jnp.stack(sizes)


@partial(jax.jit, static_argnums=0)
@full_float32
def embed_step(apply: Apply, rows: Array, g: Array) -> Array:
    """sum of c c^T, c the gradient at the looked-up row; `rows` are those of the tokens, in order."""
    params, tokens = {"embed": {"embedding": rows}}, jnp.arange(len(rows), dtype=jnp.int32).reshape(g.shape[:-1])
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, tokens).items()}
    _, back = jax.vjp(lambda taps: tap(apply)(params, taps, tokens), taps)
    (c,) = (c.reshape(-1, c.shape[-1]) for c in back(g)[0].values())
    return lax.dot_general(c, c, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
