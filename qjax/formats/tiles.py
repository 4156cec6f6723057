"""A matrix as tiles: `Format.round` over all of them at once.

[rows, n]  ->  [rows / r, G, n / (G k), r, k]        columns f32[rows, G]  ->  [rows / r, G, 1, r]
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats.protocol import Columns, Format, Scales, Shared, Tile, TileGrid
from qjax.typing import Array, Float, Integer, Shaped


def group_of(format: Format, n: int) -> int:
    """Columns of a row of n weights that share what their levels depend on; a tile at least."""
    grid: Any = format  # hashable, which its protocol cannot say
    return _group_of(grid, n)


@lru_cache(maxsize=256)  # to trace a K-quant's search takes longer than what it is asked for
def _group_of(format: Format, n: int) -> int:

    def columns(w: Array) -> Columns:
        return format.columns(format.fit(w), w.shape)

    groups = jax.tree.leaves(jax.eval_shape(columns, jax.ShapeDtypeStruct((format.rows or 1, n), jnp.float32)))
    return max(n // groups[0].shape[-1], format.tile[1])


def tabled(format: Format) -> bool:
    """Whether levels are the entries of a table that is learned, so that there are no levels of a unit scale."""
    grid: Any = format  # hashable, which its protocol cannot say
    return _tabled(grid)


@lru_cache(maxsize=256)
def _tabled(format: Format) -> bool:
    shape = jax.ShapeDtypeStruct((format.rows or 1, format.block or 256), jnp.float32)
    return len(jax.eval_shape(lambda w: format.columns(format.fit(w), w.shape), shape)) > 2


def unit_of(format: Format) -> int:
    """A row's length is a multiple of this: of whole blocks and whole tiles."""
    return lcm(format.block or 1, format.tile[1])


def tiled(x: Shaped[Array, "rows n"], tile: Tile) -> Shaped[Array, "R C r k"]:
    """A matrix as tiles of r x k."""
    (r, k), (rows, n) = tile, x.shape
    return x.reshape(rows // r, r, n // k, k).transpose(0, 2, 1, 3)


def untiled(x: Shaped[Array, "R C r k"]) -> Shaped[Array, "rows n"]:
    """The inverse of `tiled`."""
    R, C, r, k = x.shape
    return x.transpose(0, 2, 1, 3).reshape(R * r, C * k)


def bound(format: Format, scales: Scales) -> TileGrid:
    """The grid that `round` and `basis` are asked of: the format, with what all rows of a matrix share at hand."""
    return format.bound(scales) if isinstance(format, Shared) else format


def round_tiles(
    format: TileGrid, columns: Columns, w: Float[Array, "rows n"]
) -> tuple[Float[Array, "rows n"], Integer[Array, "rows m"]]:
    """What the grid has near each tile of w, and its codes.

    Args:
      columns: f32[rows, G], the same G for all, or None.
      w: rows in whole tiles and groups.
    """
    (r, k), (rows, n) = format.tile, w.shape
    groups = jax.tree.leaves(columns)[0].shape[1]
    tiles = w.reshape(rows // r, r, groups, -1, k).transpose(0, 2, 3, 1, 4)
    of_tile = jax.tree.map(
        lambda c: jnp.broadcast_to(
            c.reshape(rows // r, r, groups).transpose(0, 2, 1)[:, :, None], tiles.shape[:-1]
        ), columns,
    )  # fmt: skip
    value, code = format.round(of_tile, tiles)
    back = (0, 3, 1, 2, 4)
    return value.transpose(back).reshape(rows, n), code.transpose(back).reshape(rows, -1)
