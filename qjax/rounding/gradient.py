"""The best rounding on a gradient's path, straight through the rounding.

    w_hat = s T + m        T = level(u)        dT/du := 1 in the cells of the levels, 0 outside
    L = tr(E H E^T),  E = W - W_hat            dL/dW_hat = -2 E H

The loss and its gradient share the one product with H that a step costs. Grids are judged as stored, and the gradient
goes straight through the storing too. learned.py says what moves, and how.

Source of the estimator: Bengio, Leonard & Courville, arXiv:1308.3432, section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Columns, Format, TileGrid
from qjax.formats.tiles import bound, round_tiles
from qjax.rounding.descend import keep_better, losses
from qjax.rounding.protocol import State
from qjax.rounding.ranges import between, ends, gap, grouped, shrunk, single, span, units
from qjax.typing import Array, Float

Parameters = dict[str, Array]
Move = Callable[[Array, Parameters, Any, Parameters], tuple[Parameters, Any]]


def trained(
    state: State,
    format: Format,
    H: Float[Array, "n n"],
    parameters: Parameters,
    columns_of: Callable[[Parameters], Columns] | None,
    offset_of: Callable[[Parameters], Array] | None,
    step: Move,
    memory: Any,
    steps: int,
) -> State:
    """The best state on a gradient's path, row by row where rows stand alone; never worse than the one it starts from.

    Args:
      state: behind a fitting stage.
      H: the metric.
      parameters: where the path starts.
      columns_of: parameters to the grid before it is stored, f32[rows, G] each; None: the state's grid stays.
      offset_of: parameters to what is added to the weights in units of the scale, f32[rows, G, size]; None: nothing.
      step: (step number, parameters, memory, gradients) to parameters and memory.
      memory: of `step`, at the start.
      steps: gradients taken.
    """
    kept, shape = state.scales, state.target.shape
    assert kept is not None and state.codes is not None
    start = format.columns(kept, shape)
    unit = format.rows or shape[0]

    def rounded(p: Parameters) -> tuple[Array, tuple[Array, Columns]]:
        columns = free = start if columns_of is None else columns_of(p)
        if columns_of is not None:
            free = lax.stop_gradient(free)
            columns = jax.tree.map(passed, columns, format.columns(format.store(kept, free), shape))
        offset = None if offset_of is None else offset_of(p)
        w_hat, codes = on_grid(format, columns, state.target, offset, bound(format, kept))
        return (w_hat if state.outliers is None else jnp.where(*state.outliers, w_hat)), (codes, free)

    def turn(t: Array, now: tuple) -> tuple:
        p, memory, best, least = now
        w_hat, back, found = jax.vjp(rounded, p, has_aux=True)
        e = state.target - w_hat
        pulled = lax.dot(e, H, precision=lax.Precision.HIGHEST)
        loss = jnp.sum(jnp.sum(pulled * e, axis=1).reshape(-1, unit), axis=1)
        better = jnp.repeat(loss < least, unit)[:, None]
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)
        p, memory = step(t, p, memory, back(-2.0 * pulled)[0])
        return p, memory, best, jnp.minimum(loss, least)

    before = losses(state, format, H)
    first = (parameters, memory, (state.codes, start), before)
    _, _, (codes, columns), _ = lax.fori_loop(0, steps, turn, first)
    scales = kept if columns_of is None else format.store(kept, columns)
    new = dataclasses.replace(state, scales=scales, codes=codes)
    return keep_better(state, new, format, before, H)[0]


def on_grid(
    format: Format,
    columns: Columns,
    w: Float[Array, "rows n"],
    offset: Float[Array, "rows G size"] | None,
    levels: TileGrid | None = None,
) -> tuple[Float[Array, "rows n"], Array]:
    """w, moved by the offset, on a grid: values with gradients by all three, and codes.

    The gradient by a column is its basis; what goes straight through is w in units of the one scale, if there is one.
    `levels` is what the format is bound to, where rows share some.
    """
    levels = format if levels is None else levels
    *theta, m = columns
    one = len(theta) == 1
    s = theta[0] if one else jnp.ones_like(theta[0])
    u = units(grouped(w, s), s, m)
    u = u if offset is None else u + offset
    still = (jnp.ones_like(s), None) if one else lax.stop_gradient(columns)
    T, codes = round_tiles(levels, still, lax.stop_gradient(u).reshape(w.shape))
    inside = jnp.clip(u, *cells(format)) if single(format, columns) else u
    q = s[..., None] * passed(inside, T.reshape(u.shape))
    for t, B in zip(theta, () if one else levels.basis(codes), strict=False):
        q = q + (t - lax.stop_gradient(t))[..., None] * B.reshape(u.shape)
    return (q if m is None else q + m[..., None]).reshape(w.shape), codes


def shares(format: Format, columns: Columns) -> Callable[[Parameters], Columns]:
    """From shares of the two ends of each group's range, f32[rows, G] each, to the grid of what is left."""

    def to_columns(share: Parameters) -> Columns:
        def range_of(s: Array, m: Array) -> tuple[Array, Array]:
            low, high = span(format, s, m)
            return between(format, low * share["low"], high * share["high"])

        return shrunk(format, columns, share["high"], range_of)

    return to_columns


def passed(x: Array, value: Array) -> Array:
    """`value` with the gradient of x."""
    x_still = lax.stop_gradient(x)
    return lax.stop_gradient(value) + (x - x_still)


def cells(format: Format) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Where the cells of the first and the last unit level end: half a gap outside of them."""
    lo, hi = ends(format)
    return lo - 0.5 * gap(format, lo, jnp.bool_(True)), hi + 0.5 * gap(format, hi, jnp.bool_(False))
