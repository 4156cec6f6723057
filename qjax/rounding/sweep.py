"""One pass over the columns of a weight: error feedback and coordinate descent are both this.

    t_j = w_j + sum_{k != j} e_k C_kj        q_j = level nearest to t_j        e_j <- w_j - q_j        j = n-1 ... 0

With H = L D L^T (L unit lower) and e = 0 at the start, C = L - 1 is LDLQ, which is GPTQ (QuIP, arXiv:2307.13304,
theorem 6). With C_kj = H_kj / H_jj and the errors of an earlier rounding, t_j minimizes tr(e H e^T) over column j while
all others stand still: coordinate descent, which cannot raise it.

Arrays are transposed, columns first: [n, rows]. Rows do not know of each other. Columns go in blocks of 256 (one
product with all of C, or with what lies below them), in these in blocks of 16, in these one tile at a time, so that
almost all work is matrix products and the compiled program's size does not depend on n.
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm

import jax.numpy as jnp
from jax import lax

from qjax.typing import Array, Float

OUTER, INNER = 256, 16


def outer_of(tile: int) -> int:
    """Columns of a block for tiles of this size: about OUTER, whole tiles."""
    unit = lcm(INNER, tile) if lcm(INNER, tile) <= OUTER else tile
    return max(OUTER // unit, 1) * unit


Columns = tuple[Array, Array | None]  # s and m of each column of a block: f32[block, rows]
GridOf = Callable[[Array, Array], Columns]  # (first column, targets f32[block, rows]) -> the block's grid
Level = Callable[[Array], Array]


def sweep(
    w: Float[Array, "n rows"],
    e: Float[Array, "n rows"],
    coupling: Float[Array, "n n"],
    grid_of: GridOf,
    level: Level,
    tile: int = 1,
    outer: int = OUTER,
    pull: Float[Array, "n rows"] | None = None,
    lower: bool = False,
    reach: Float[Array, "n 1"] | None = None,
) -> tuple[Float[Array, "n rows"], Float[Array, "n rows"]]:
    """Round every column once, the last first.

    Args:
      w: the weights, transposed.
      e: errors w - q before the pass.
      coupling: C, zero on its diagonal tiles.
      grid_of: the grid of a block, asked for when the block's turn has come; it may look at the block's targets.
      level: the format's unit levels, elementwise; for tiles of several weights over the last axis.
      tile: weights rounded together; divides n.
      outer: columns of a block.
      pull: added to the targets: what errors outside of these columns ask for.
      lower: C is strictly lower triangular and e is zero: feedback, at half the products.
      reach: a target farther than this from its level is taken itself: an outlier that is stored exactly.

    Returns: the errors after the pass, and the targets of each block as they were when its turn came.
    """
    n = w.shape[0]
    inner = lcm(INNER, tile) if outer % lcm(INNER, tile) == 0 else outer
    blocks = -(-n // outer)
    pad = blocks * outer - n
    if pad:  # columns without weight, error or coupling
        w, e = (jnp.pad(a, ((0, pad), (0, 0))) for a in (w, e))
        pull = None if pull is None else jnp.pad(pull, ((0, pad), (0, 0)))
        coupling = jnp.pad(coupling, ((0, pad), (0, pad)))
        reach = None if reach is None else jnp.pad(reach, ((0, pad), (0, 0)))

    def rounded(target: Array, s: Array, m: Array | None, reach: Array | None) -> Array:
        u = target if m is None else target - m
        u = jnp.where(s == 0, 0.0, u / jnp.where(s == 0, 1.0, s))
        q = s * (level(u) if tile == 1 else level(u.T).T)
        q = q if m is None else q + m
        return q if reach is None else jnp.where(jnp.abs(target - q) > reach, target, q)

    def one_tile(i: Array, state: tuple, at: tuple) -> tuple:
        e_sub, moved = state
        w_sub, targets, c_sub, s, m, r = at
        j = inner - (i + 1) * tile
        t = _rows(targets, j, tile) + _product(lax.dynamic_slice_in_dim(c_sub, j, tile, 1), moved)
        m, r = (None if a is None else _rows(a, j, tile) for a in (m, r))
        new = _rows(w_sub, j, tile) - rounded(t, _rows(s, j, tile), m, r)
        moved = _put(moved, new - _rows(e_sub, j, tile), j)
        return _put(e_sub, new, j), moved

    def one_inner(i: Array, state: tuple, at: tuple) -> tuple:
        e_blk, moved = state
        w_blk, targets, c_blk, s, m, r = at
        j = outer - (i + 1) * inner
        c_cols = lax.dynamic_slice_in_dim(c_blk, j, inner, 1)
        t = _rows(targets, j, inner) + _product(c_cols, moved)
        grid = [None if a is None else _rows(a, j, inner) for a in (s, m, r)]
        inside = (_rows(w_blk, j, inner), t, _rows(c_cols, j, inner), *grid)
        old = _rows(e_blk, j, inner)
        new, change = lax.fori_loop(0, inner // tile, lambda k, st: one_tile(k, st, inside), (old, jnp.zeros_like(old)))
        return _put(e_blk, new, j), _put(moved, change, j)

    def one_outer(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        e, seen = state
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
        s, m = grid_of(j, targets)
        inside = (w_blk, targets, _rows(c_cols, j, outer), s, m, None if reach is None else _rows(reach, j, outer))
        old = _rows(e, j, outer)
        new, _ = lax.fori_loop(0, outer // inner, lambda k, st: one_inner(k, st, inside), (old, jnp.zeros_like(old)))
        return _put(e, new, j), _put(seen, targets, j)

    e, seen = lax.fori_loop(0, blocks, one_outer, (e, w))
    return e[:n], seen[:n]


def fixed_grid(s: Float[Array, "G rows"], m: Array | None, group: Array, outer: int = OUTER) -> GridOf:
    """A grid known beforehand: column j has the scales of row group[j] of s and m."""
    count, n = s.shape[0], group.shape[0]
    group = jnp.pad(group, (0, -n % outer), constant_values=count)  # padded columns have a zero scale
    s = jnp.pad(s, ((0, 1), (0, 0)))
    m = None if m is None else jnp.pad(m, ((0, 1), (0, 0)))

    def grid_of(j: Array, targets: Array) -> Columns:
        del targets
        at = lax.dynamic_slice_in_dim(group, j, outer)
        return jnp.take(s, at, axis=0), None if m is None else jnp.take(m, at, axis=0)

    return grid_of


def _rows(a: Array, j: Array, count: int) -> Array:
    return lax.dynamic_slice_in_dim(a, j, count, 0)


def _put(a: Array, rows: Array, j: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(a, rows, j, 0)


def _product(c: Array, e: Array) -> Array:
    """c^T e in full float32."""
    return lax.dot_general(c, e, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
