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

from qjax.formats.protocol import Format
from qjax.rounding.descend import keep_better, losses
from qjax.rounding.protocol import State, errors_of
from qjax.rounding.ranges import between, ends, gap, grid_of_state, grouped, span, units
from qjax.typing import Array, Float

Parameters = dict[str, Array]
Step = Callable[[Array, Parameters, Any, Parameters], tuple[Parameters, Any]]


def trained(
    state: State,
    format: Format,
    H: Float[Array, "n n"],
    parameters: Parameters,
    grid_of: Callable[[Parameters], tuple[Array, Array | None]] | None,
    offset_of: Callable[[Parameters], Array] | None,
    step: Step,
    memory: Any,
    steps: int,
) -> State:
    """The best state on a gradient's path, row by row where rows stand alone; never worse than the one it starts from.

    Args:
      state: behind a fitting stage.
      H: the metric.
      parameters: where the path starts.
      grid_of: parameters to (s, m), before they are stored, each f32[rows, G]; None: the state's grid stays.
      offset_of: parameters to what is added to the argument of `level`, f32[rows, G, size]; None: nothing.
      step: (step number, parameters, memory, gradients) to parameters and memory.
      memory: of `step`, at the start.
      steps: gradients taken.
    """
    kept, shape = state.scales, state.target.shape
    assert kept is not None
    s0, m0 = grid_of_state(state, format)
    x = grouped(state.target, s0)
    reach = cells(format)

    def rounded(p: Parameters) -> tuple[Array, tuple[Array, Array | None]]:
        s, m = free = (s0, m0) if grid_of is None else grid_of(p)
        if grid_of is not None:
            free = jax.tree.map(lax.stop_gradient, free)
            stored = format.grid(format.store(kept, *free), shape)
            s, m = jax.tree.map(passed, (s, m), stored)
        u = units(x, s, m)
        q = s[..., None] * straight_through(format, u if offset_of is None else u + offset_of(p), reach)
        return (q if m is None else q + m[..., None]).reshape(shape), free

    def turn(t: Array, now: tuple) -> tuple:
        p, memory, best, least = now
        w_hat, back, grid = jax.vjp(rounded, p, has_aux=True)
        e = state.target - w_hat
        pulled = lax.dot(e, H, precision=lax.Precision.HIGHEST)
        loss = jnp.sum(pulled * e, axis=1)
        loss = loss if format.row_wise else jnp.sum(loss)[None]
        better = (loss < least)[:, None]
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), (w_hat, grid), best)
        p, memory = step(t, p, memory, back(-2.0 * pulled)[0])
        return p, memory, best, jnp.minimum(loss, least)

    before = losses(state, format, H)
    start = (parameters, memory, (state.target - errors_of(state, format), (s0, m0)), before)
    _, _, (w_hat, grid), _ = lax.fori_loop(0, steps, turn, start)
    scales = kept if grid_of is None else format.store(kept, *grid)
    new = dataclasses.replace(state, scales=scales, codes=format.nearest(scales, w_hat))
    return keep_better(state, new, format, before, H)[0]


def shrunk(format: Format, s: Array, m: Array | None) -> Callable[[Parameters], tuple[Array, Array | None]]:
    """From shares of the two ends of each group's range, f32[rows, G] each, to the grid of what is left."""

    def to_grid(share: Parameters) -> tuple[Array, Array | None]:
        if m is None:
            return s * share["high"], None
        low, high = span(format, s, m)
        return between(format, low * share["low"], high * share["high"])

    return to_grid


def straight_through(format: Format, u: Float[Array, "*u"], reach: tuple[Array, Array]) -> Float[Array, "*u"]:
    """level(u) with the gradient of clip(u, *reach): 1 inside of the levels' cells, 0 outside."""
    return passed(jnp.clip(u, *reach), format.level(lax.stop_gradient(u)))


def passed(x: Array, value: Array) -> Array:
    """`value` with the gradient of x."""
    x_still = lax.stop_gradient(x)
    return lax.stop_gradient(value) + (x - x_still)


def cells(format: Format) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Where the cells of the first and the last unit level end: half a gap outside of them."""
    lo, hi = ends(format)
    return lo - 0.5 * gap(format, lo, jnp.bool_(True)), hi + 0.5 * gap(format, hi, jnp.bool_(False))
