"""One Gauss-Seidel pass over a weight: its grid by least squares of tr(E H E^T), and its codes, in turns.

    w_hat = sum_k theta_k B_k + m      [B_k H B_l^T] d_theta = [G B_k^T],  G = E H      e <- e - sum_k d_theta_k B_k

group after group, for all that a format is linear in: scales and offsets, or the entries of a table (m's basis is 1).
The solution is rounded to what the format stores before the next group is looked at, which then makes up for that
rounding, and is taken only where the loss with it is smaller. The weight's columns go in units of about 256; once the
grid of a unit is done its codes are swept on it (sweep.py), with the same G, so that a pass over scales and codes is
one product with H. What codes are, the pass does not know: single levels (refit.py), or mixtures (annealed.py).

Source: the H-metric refit of Spherical GPTQ (arXiv:2603.11021) and LNQ's codebook step (arXiv:2505.07004), here as
Gauss-Seidel over groups with an offset, and with scales that are themselves quantized.
"""

from __future__ import annotations

from math import lcm
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Columns, Format, Scales, TileRounding
from qjax.rounding.curvature import descent, over_tiles, tiles_of
from qjax.rounding.descend import exactly
from qjax.rounding.protocol import State
from qjax.rounding.sweep import OUTER, fixed_grid, in_place, outer_of, sweep
from qjax.typing import Array, Bool, Float

_RIDGE = 1e-4  # a group whose levels are all equal has no slope of its own


@runtime_checkable
class Coding(Protocol):
    """What weights are on a grid, between two looks at it: arrays of codes, [rows, m, ...]."""

    def basis(self, codes: Any) -> tuple[Array, ...]:
        """B_1 ... B_K, f32[rows, n] each."""

    def on(self, columns: Columns, codes: Any) -> tuple[TileRounding, Columns]:
        """What a sweep rounds to, and its columns, f32[rows, G] each."""

    def moved(self, codes: Any, swept: Array) -> Any:
        """The codes behind a sweep that found these."""


def in_units(
    e: Float[Array, "rows n"],
    codes: Any,
    coding: Coding,
    state: State,
    format: Format,
    H: Float[Array, "n n"],
    sweeps: int,
    solves: Bool[Array, ""] | bool = True,
) -> tuple[Float[Array, "rows n"], Any, Scales]:
    """One pass over the units of columns: their groups solved for, then their codes swept, `sweeps` turns of both.

    Args:
      e: target - w_hat.
      codes: of all weights, as `coding` understands them.
      state: its scales, its target, and which weights are outliers.
      solves: False: codes are swept on the scales as they are.

    Returns: errors, codes and scales after it.
    """
    scales = state.scales
    assert scales is not None
    (rows, n), tile = e.shape, format.tile[1]
    columns = format.columns(scales, e.shape)
    groups, offset = columns[0].shape[-1], columns[-1] is not None
    size = n // groups

    # Units of whole blocks, about OUTER columns each; a unit's scales are a slice of every leaf along the row.
    block = format.block or n
    if format.rows == 1:  # a super-scale may be the row's, whatever the block
        block = lcm(block, *(n // leaf.shape[1] for leaf in scales.values()))
    count = _units(n, lcm(max(block, size), tile))
    per, outer = groups // count, n // count

    def unit(a: Array) -> Array:
        """[rows, x, ...] -> [count, rows, x / count, ...]."""
        return jnp.moveaxis(a.reshape(rows, count, a.shape[1] // count, *a.shape[2:]), 1, 0)

    def snap(kept: Scales, columns: Columns) -> tuple[Scales, Columns]:
        if format.rows != 1:
            return kept, columns
        kept = format.store(kept, columns)
        return kept, format.columns(kept, (rows, outer))

    def one_group(g: Array, now: tuple, at: tuple) -> tuple:
        moved, kept, columns = now
        gradient, basis, H_u = at
        j = g * size
        B = [lax.dynamic_slice_in_dim(b, j, size, 0) for b in basis]
        H_g = lax.dynamic_slice_in_dim(H_u, j, size, 0)
        grad = lax.dynamic_slice_in_dim(gradient, j, size, 0) + _dot(H_g, moved)
        H_gg = lax.dynamic_slice_in_dim(H_g, j, size, 1)
        HB = [_dot(H_gg, b) for b in B]
        A = [[jnp.sum(b * hb, axis=0) for hb in HB] for b in B]
        p = [jnp.sum(b * grad, axis=0) for b in B]
        here = (jnp.arange(per) == g)[None, :]
        step = iter(solved(A, p))
        new, new_columns = snap(kept, jax.tree.map(lambda c: c + jnp.where(here, next(step)[:, None], 0.0), columns))
        change = jax.tree.map(lambda a, b: lax.dynamic_index_in_dim(a - b, g, 1, keepdims=False), new_columns, columns)
        d = jax.tree.leaves(change)  # as stored
        gain = 2 * sum(x * y for x, y in zip(d, p, strict=True)) - quadratic(A, d)
        better = gain > 0

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(better.reshape((-1,) + (1,) * (y.ndim - 1)), x, y), new, old)

        here_moved = jnp.where(better[None], -sum(x[None] * b for x, b in zip(d, B, strict=True)), 0.0)
        moved = lax.dynamic_update_slice_in_dim(moved, here_moved, j, 0)
        return moved, choose(new, kept), choose(new_columns, columns)

    def basis_of(codes: Any, taken: Array | None) -> list[Array]:
        """B_1 ... B_K and the offset's 1, f32[outer, rows or 1]; 0 for outliers, which no grid moves."""
        B = [b.T for b in coding.basis(codes)] + ([jnp.ones((outer, 1), jnp.float32)] if offset else [])
        return B if taken is None else [jnp.where(taken, 0.0, b) for b in B]

    def one_unit(e: Array, at: tuple) -> tuple:
        i, w, H_rows, kept, columns, codes, taken = at
        H_u = lax.dynamic_slice_in_dim(H_rows, i * outer, outer, 1)
        e_u = lax.dynamic_slice_in_dim(e, i * outer, outer, 0)
        outside = _dot(H_rows, e) - _dot(H_u, e_u)  # what the other units ask for
        width = min(outer_of(tile), outer)
        coupling, pull, own = descent(H_u, tile), over_tiles(outside.T, H_u, tile).T, tiles_of(H_u, tile)
        reach = None if taken is None else exactly(taken)

        def turn(_: Array, now: tuple) -> tuple:
            e_u, codes, kept, columns = now
            about = (outside + _dot(H_u, e_u), basis_of(codes, taken), H_u)
            start = (jnp.zeros_like(e_u), kept, columns)
            last = per if solves is True else jnp.where(solves, per, 0)
            moved, kept, columns = lax.fori_loop(0, last, lambda g, now: one_group(g, now, about), start)
            e_u = e_u + moved
            if sweeps:
                levels, on = coding.on(columns, codes)
                grid = fixed_grid(on, jnp.arange(outer), width)
                e_u, tiles, _ = sweep(levels, w, e_u, coupling, grid, width, pull=pull, metric=own, reach=reach)
                codes = coding.moved(codes, in_place(tiles, jnp.arange(outer), tile))
            return e_u, codes, kept, columns

        e_u, *new = lax.fori_loop(0, max(sweeps, 1), turn, (e_u, codes, kept, columns))
        return lax.dynamic_update_slice_in_dim(e, e_u, i * outer, 0), new

    mask = None if state.outliers is None else state.outliers[0]
    units = (
        jnp.arange(count), state.target.T.reshape(count, outer, rows), H.reshape(count, outer, n),
        jax.tree.map(unit, scales) if format.rows == 1 else {}, jax.tree.map(unit, columns), jax.tree.map(unit, codes),
        None if mask is None else mask.T.reshape(count, outer, rows),
    )  # fmt: skip
    swept: tuple[Array, tuple[Any, Scales, Columns]] = lax.scan(one_unit, e.T, units)
    e_new, (codes_new, kept, columns_new) = swept

    def whole(a: Array, like: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(like.shape)

    if format.rows == 1:
        scales = jax.tree.map(whole, kept, scales)
    else:
        scales = format.store(scales, jax.tree.map(whole, columns_new, columns))
    return e_new.T, jax.tree.map(whole, codes_new, codes), scales


def solved(A: list[list[Array]], p: list[Array]) -> list[Array]:
    """d of A d = p for each row, A symmetric and perhaps singular; [rows] or [1] each.

    One and two unknowns in closed form; where two cannot be told apart, the first alone.
    """
    (a, *_), first = A[0], p[0]
    alone = jnp.where(a > 0, first / jnp.where(a > 0, a, 1.0), 0.0)
    if len(p) == 1:
        return [alone]
    if len(p) == 2:
        b, c = A[0][1], A[1][1]
        det = a * c - b * b
        ok = det > _RIDGE * a * c
        inverse = jnp.where(ok, 1.0 / jnp.where(ok, det, 1.0), 0.0)
        return [
            jnp.where(ok, (first * c - p[1] * b) * inverse, alone),
            jnp.where(ok, (p[1] * a - first * b) * inverse, 0.0),
        ]
    wide = jnp.broadcast_shapes(*(x.shape for x in p))
    M = jnp.stack([jnp.stack([jnp.broadcast_to(x, wide) for x in line], axis=-1) for line in A], axis=-2)
    size = jnp.diagonal(M, axis1=-2, axis2=-1)
    M = M + jax.vmap(jnp.diag)(_RIDGE * size + jnp.where(size > 0, 0.0, 1.0))
    return list(jnp.moveaxis(jnp.linalg.solve(M, jnp.stack(p, axis=-1)[..., None])[..., 0], -1, 0))


def quadratic(A: list[list[Array]], d: list[Array]) -> Array:
    """d A d^T of each row, A symmetric."""
    squares = [x * x * A[i][i] for i, x in enumerate(d)]
    twice = [2 * x * y * A[i][j] for i, x in enumerate(d) for j, y in enumerate(d[:i])]
    return sum(squares[1:] + twice, squares[0])


def _units(n: int, block: int) -> int:
    """How many parts of whole blocks, the largest of at most OUTER columns that divide the row."""
    blocks = n // block
    per = max(1, OUTER // block)
    while blocks % per:
        per -= 1
    return blocks // per


def _dot(a: Array, b: Array) -> Array:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST)
