"""One pass over the columns of a weight: error feedback and coordinate descent are both this.

    t_j = w_j + sum_{k != j} e_k C_kj        q_j, code_j = round(t_j)        e_j <- w_j - q_j        j = n-1 ... 0

With H = L D L^T (L unit lower) and e = 0 at the start, C = L - 1 is LDLQ, which is GPTQ (QuIP, arXiv:2307.13304,
theorem 6). With C_kj = H_kj / H_jj and the errors of an earlier rounding, t_j minimizes tr(e H e^T) over column j while
all others stand still: coordinate descent, which cannot raise it.

A column is a tile's where the format rounds several together. Arrays are transposed, columns first: [n, rows]; rows
know of each other only inside of a tile. Columns go in blocks of 256 (one product with all of C, or with what lies
below them), in these in blocks of 16, in these one tile at a time, so that almost all work is matrix products and the
size of the compiled program does not depend on n.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import Columns, TileRounding
from qjax.typing import Array, Float, Int, Shaped

OUTER, INNER = 256, 16


def outer_of(tile: int) -> int:
    """Columns of a block for tiles of this width: about OUTER, whole tiles."""
    unit = lcm(INNER, tile) if lcm(INNER, tile) <= OUTER else tile
    return max(OUTER // unit, 1) * unit


ColumnsOf = Callable[[Array, Array], tuple[Columns, Any]]
"""(first column, targets f32[block, rows]) -> the block's columns as the format has them, f32[block, rows] each, and
what is to be kept of it."""


def sweep(
    format: TileRounding,
    w: Float[Array, "n rows"],
    e: Float[Array, "n rows"],
    coupling: Float[Array, "n n"],
    columns_of: ColumnsOf,
    outer: int,
    *,
    pull: Float[Array, "n rows"] | None = None,
    lower: bool = False,
    metric: Float[Array, "t k k"] | None = None,
    reach: Float[Array, "n _"] | None = None,
) -> tuple[Float[Array, "n rows"], Shaped[Array, "t j rows"], Any]:
    """Round every column once, the last first.

    Args:
      w: the weights, transposed.
      e: errors w - q before the pass.
      coupling: C, zero on its diagonal tiles.
      columns_of: the grid of a block, asked for when the block's turn has come; it may look at the block's targets.
      outer: columns of a block.
      pull: added to the targets: what errors outside of these columns ask for.
      lower: C is strictly lower triangular and e is zero: feedback, at half the products.
      metric: what each tile is rounded in; None: the squared error.
      reach: a target farther than this from its level is taken itself: an outlier that is stored exactly.

    Returns: the errors after the pass, the codes of each tile, and what was kept of each block.
    """
    n, rows = w.shape
    r, tile = format.tile
    inner = lcm(INNER, tile) if outer % lcm(INNER, tile) == 0 else outer
    blocks = -(-n // outer)
    pad = blocks * outer - n
    if pad:  # columns without weight, error or coupling
        w, e = (jnp.pad(a, ((0, pad), (0, 0))) for a in (w, e))
        pull = None if pull is None else jnp.pad(pull, ((0, pad), (0, 0)))
        coupling = jnp.pad(coupling, ((0, pad), (0, pad)))
        reach = None if reach is None else jnp.pad(reach, ((0, pad), (0, 0)))
        metric = None if metric is None else jnp.pad(metric, ((0, pad // tile), (0, 0), (0, 0)))
    metric = metric if tile > 1 else None

    def rounded(target: Array, columns: Columns, M: Array | None, reach: Array | None) -> tuple[Array, Array]:
        """f32[tile, rows] and the columns of its first -> values f32[tile, rows], codes [j, rows]."""
        of_rows = jax.tree.map(lambda c: c[0].reshape(rows // r, r), columns)
        q, code = format.round(of_rows, target.T.reshape(rows // r, r, tile), M)
        q = q.reshape(rows, tile).T
        q = q if reach is None else jnp.where(jnp.abs(target - q) > reach, target, q)
        return q, code.reshape(rows, -1).T

    def one_tile(i: Array, state: tuple, at: tuple) -> tuple:
        e_sub, moved, codes = state
        w_sub, targets, c_sub, columns, M, reach = at
        k = inner // tile - 1 - i
        j = k * tile
        t = _rows(targets, j, tile) + _product(lax.dynamic_slice_in_dim(c_sub, j, tile, 1), moved)
        columns, reach = jax.tree.map(lambda a: _rows(a, j, tile), (columns, reach))
        q, code = rounded(t, columns, None if M is None else M[k], reach)
        new = _rows(w_sub, j, tile) - q
        moved = _put(moved, new - _rows(e_sub, j, tile), j)
        return _put(e_sub, new, j), moved, lax.dynamic_update_index_in_dim(codes, code, k, 0)

    def one_inner(i: Array, state: tuple, at: tuple) -> tuple:
        e_blk, moved, codes = state
        w_blk, targets, c_blk, grid, M = at
        j = outer - (i + 1) * inner
        c_cols = lax.dynamic_slice_in_dim(c_blk, j, inner, 1)
        t = _rows(targets, j, inner) + _product(c_cols, moved)
        columns, reach = jax.tree.map(lambda a: _rows(a, j, inner), grid)
        M = None if M is None else _rows(M, j // tile, inner // tile)
        inside = (_rows(w_blk, j, inner), t, _rows(c_cols, j, inner), columns, M, reach)
        old, now = _rows(e_blk, j, inner), _rows(codes, j // tile, inner // tile)
        new, change, now = lax.fori_loop(
            0, inner // tile, lambda k, st: one_tile(k, st, inside), (old, jnp.zeros_like(old), now)
        )
        return _put(e_blk, new, j), _put(moved, change, j), _put(codes, now, j // tile)

    def one_outer(i: Array, state: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        e, codes, kept = state
        j = (blocks - 1 - i) * outer
        c_cols = lax.dynamic_slice_in_dim(coupling, j, outer, 1)
        w_blk = _rows(w, j, outer)
        targets = w_blk if pull is None else w_blk + _rows(pull, j, outer)
        if lower:  # only blocks behind this one
            targets = lax.fori_loop(
                blocks - i, blocks,
                lambda k, t: t + _product(_rows(c_cols, k * outer, outer), _rows(e, k * outer, outer)), targets,
            )  # fmt: skip
        else:
            targets += _product(c_cols, e)
        columns, keep = columns_of(j, targets)
        grid = columns, None if reach is None else _rows(reach, j, outer)
        M = None if metric is None else _rows(metric, j // tile, outer // tile)
        inside = (w_blk, targets, _rows(c_cols, j, outer), grid, M)
        old, now = _rows(e, j, outer), _rows(codes, j // tile, outer // tile)
        new, _, now = lax.fori_loop(
            0, outer // inner, lambda k, st: one_inner(k, st, inside), (old, jnp.zeros_like(old), now)
        )
        kept = jax.tree.map(lambda a, x: lax.dynamic_update_index_in_dim(a, x, blocks - 1 - i, 0), kept, keep)
        return _put(e, new, j), _put(codes, now, j // tile), kept

    def first() -> tuple[Array, Any]:
        columns, keep = columns_of(jnp.int32(0), w[:outer])
        return rounded(w[:tile], columns, None if metric is None else metric[0], None)[1], keep

    code, keep = jax.eval_shape(first)
    codes = jnp.zeros((blocks * outer // tile, *code.shape), code.dtype)
    kept = jax.tree.map(lambda a: jnp.zeros((blocks, *a.shape), a.dtype), keep)
    e, codes, kept = lax.fori_loop(0, blocks, one_outer, (e, codes, kept))
    return e[:n], codes[: n // tile], kept


def fixed_grid(columns: Columns, order: Int[Array, "n"], outer: int) -> ColumnsOf:
    """A grid known beforehand: f32[rows, G] each, for columns in `order`."""
    n = order.shape[0]
    padded = jnp.pad(order, (0, -n % outer), constant_values=n)
    ready = jax.tree.map(lambda c: jnp.pad(c.T, ((0, 1), (0, 0))), columns)  # padded columns have a zero scale

    def columns_of(j: Array, targets: Array) -> tuple[Columns, None]:
        del targets
        at = lax.dynamic_slice_in_dim(padded, j, outer)

        def taken(c: Array) -> Array:
            groups = c.shape[0] - 1
            return jnp.take(c, jnp.where(at < n, at // (n // groups), groups), axis=0)

        return jax.tree.map(taken, ready), None

    return columns_of


def in_place(codes: Shaped[Array, "t j rows"], order: Int[Array, "n"], tile: int) -> Shaped[Array, "rows m"]:
    """The codes of tiles that were rounded in `order`, where they belong."""
    tiles = jnp.zeros_like(codes).at[order[::tile] // tile].set(codes)
    return tiles.reshape(-1, codes.shape[2]).T


def _rows(a: Array, j: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(a, j, count, 0)


def _put(a: Array, rows: Array, j: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(a, rows, j, 0)


def _product(c: Array, e: Array) -> Array:
    """c^T e in full float32."""
    return lax.dot_general(c, e, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
