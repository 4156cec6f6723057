"""What is done to one piece of a decoder with all windows: run it, look at an input of it, go through it backwards.

Each is one program a shape, whatever the layer; weights come in, a piece at a time, and leave again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.calibrate import add, check_stats, means, sums
from qjax.calibrate.observe import mapped
from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.lifting import Use, report, tap, tap_shapes, watch
from qjax.models.devices import each_step
from qjax.models.parts import Parts, Table, embed, run_windows
from qjax.models.stages import Apply, Stages
from qjax.pipeline.activations import Activations, Streams, Writer
from qjax.pipeline.encode import check_finite
from qjax.pipeline.few_tokens import are_few, filled
from qjax.pipeline.output_curvature import summed_curvature
from qjax.pipeline.windows import Calibration
from qjax.stats import Stats
from qjax.typing import Array

Sent = tuple[np.ndarray, np.ndarray]  # tokens of each expert among those used, and among those held out


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


def observe_inputs(
    calibration: Calibration,
    kinds: tuple[str, ...],
    apply: Apply,
    to_all: Apply,
    uses: Sequence[Use],
    params: Any,
    floats: Any,
    streams: Streams,
    weights: Sequence[np.ndarray | None],
    names: Sequence[str],
) -> list[tuple[Stats, Stats | None, Sent | None]]:
    """Means at the inputs of some uses, in one pass: over the windows that are used, and over those held out.

    Those of experts are stacked, and filled up where they saw few tokens, by `to_all`, the piece that sends every token
    to each: then what they saw comes too.

    Args:
      weights: how much the tokens count at each of them.
      names: of a weight there, for messages.
    """
    here = (params, floats, streams)
    found = _means(calibration, kinds, apply, uses, *here, weights)
    made: list[tuple[Stats, Stats | None, Sent | None]] = []
    for use, weight, name, (used, held) in zip(uses, weights, names, found, strict=True):
        if not float(jnp.max(jnp.asarray(1 if used.count is None else used.count))):  # tokens pass all of a decoder
            raise UserError(
                f"{name}: its input is zero at every token; the model's weights in front of it are all zeros"
            )
        n = float(math.prod(use.shape[axis] for axis in use.axes))
        part = n * calibration.heldout / calibration.used
        sent = None
        if are_few(used, n) or (held is not None and are_few(held, part)):
            sent = np.asarray(used.count), np.asarray(0.0 if held is None else held.count)
            ((of_all, held_of_all),) = _means(calibration, kinds, to_all, (use,), *here, (weight,))
            used = filled(used, of_all, n)
            if held is not None and held_of_all is not None:
                held = filled(held, held_of_all, part)
        check_stats(dataclasses.replace(used, count=None), name)
        made.append((used, held, sent))
    return made


def _means(
    calibration: Calibration,
    kinds: tuple[str, ...],
    apply: Apply,
    uses: Sequence[Use],
    params: Any,
    floats: Any,
    streams: Streams,
    weights: Sequence[np.ndarray | None],
) -> list[tuple[Stats, Stats | None]]:
    totals: list[list[Stats] | None] = [None, None]
    x_float = None if streams.x_float is None else streams.x_float.array
    static = apply, tuple((use.source, use.batch) for use in uses), kinds
    whole, rows = (params, None if x_float is None else floats), (streams.x.array, x_float, *weights)
    for at, part in each_step(_observe_step, static, whole, rows, calibration.steps):
        which = int(at.start >= calibration.used)
        before = totals[which]
        totals[which] = part if before is None else [add(a, b) for a, b in zip(before, part, strict=True)]
    used, held = totals
    assert used is not None
    return [(means(a), None if held is None else means(held[i])) for i, a in enumerate(used)]


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_float32
def _observe_step(
    apply: Apply,
    inputs: tuple[tuple[int, int], ...],
    kinds: tuple[str, ...],
    params: Any,
    floats: Any,
    x: Array,
    x_float: Array | None,
    *weights: Array | None,
) -> list[Stats]:
    """The sums of some inputs, (source, batch), for one batch; what lies behind the last is dead code."""
    wanted = {source for source, _ in inputs}

    def at(params: Any, x: Array) -> dict[int, Any]:
        return watch(apply, lambda use, v: v if use.source in wanted else None)(params, x)[1]

    here, there = at(params, x), None if x_float is None else at(floats, x_float)
    found = []
    for (source, batch), weight in zip(inputs, weights, strict=True):
        if there is None:
            found.append(mapped(lambda x, v=weight: sums(x, kinds, None, v), batch)(here[source]))
        else:
            both = mapped(lambda x, x_float, v=weight: sums(x, kinds, x_float, v), batch)
            found.append(both(here[source], there[source]))
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_float32
def block_step(
    apply: Apply,
    keys: tuple[tuple[str, ...], ...],
    rows: tuple[tuple[str, int], ...],
    params: Any,
    x: Array,
    g: Array,
) -> tuple[Array, Array, dict[str, Array]]:
    """dL/dx; |dL/dy|^2 of each group of weights, of all its experts, token by token: f32[groups, b, t]; and the sums of
    G at the output of each weight of `rows`, (key, rows of a block), see output_curvature.py."""
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, x).items()}
    _, back = jax.vjp(lambda taps, x: tap(apply)(params, taps, x), taps, x)
    by_output, by_input = back(g)

    def size(y: Array) -> Array:
        return jnp.sum(jnp.sum(jnp.square(y), axis=-1).reshape(-1, *x.shape[:2]), axis=0)

    def curvature(y: Array, m: int) -> Array:
        tokens = y.reshape(*y.shape[:-3], x.shape[0] * x.shape[1], y.shape[-1])
        return summed_curvature(tokens, m)

    sizes = [sum(size(by_output[k]) for k in group) for group in keys]
    return by_input, jnp.stack(sizes), {k: curvature(by_output[k], m) for k, m in rows}


@partial(jax.jit, static_argnums=0)
@full_float32
def embed_step(apply: Apply, rows: Array, g: Array) -> Array:
    """sum of c c^T, c the gradient at the looked-up row; `rows` are those of the tokens, in order."""
    params, tokens = {"embed": {"embedding": rows}}, jnp.arange(len(rows), dtype=jnp.int32).reshape(g.shape[:-1])
    taps = {k: jnp.zeros(s.shape, s.dtype) for k, s in tap_shapes(apply, params, tokens).items()}
    _, back = jax.vjp(lambda taps: tap(apply)(params, taps, tokens), taps)
    (c,) = (c.reshape(-1, c.shape[-1]) for c in back(g)[0].values())
    return lax.dot_general(c, c, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
