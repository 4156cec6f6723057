"""Scales as they are stored, searched inside the rounding: each block tries the numbers beside its own.

    t_j = w_j + sum_{k != j} e_k H_kj / H_jj        q_j = nearest(t_j) on the grid of scale s'        j in the block
    s <- the s' of least (e H e^T) over the block's columns, those of all other blocks as they are

A scale of 4 or 6 bits, of a byte or of one exponent leaves a block few values, and which is best shows only once codes
are chosen anew on each: here by one pass of descent (descend.py) from the codes there are. The least squares of
refit.py find the scale for given codes; this one changes both at once, block after block. Never a larger loss.

Source: ours, in the metric of H; the search over neighbouring integer scales is ik_llama.cpp's (pull request 624), over
two scales of an NVFP4 block Four-over-Six's (arXiv:2512.02010), over all E4M3 scales ScaleSweep's (arXiv:2606.07618).
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format, Stepped
from qjax.rounding.curvature import descent, over_tiles, tiles_of
from qjax.rounding.descend import exactly, keep_better, losses
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.sweep import fixed_grid, in_place, outer_of, sweep
from qjax.stats import Stats
from qjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Neighbours(Rounding):
    """See `neighbours`."""

    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"neighbours: rounds must be at least 1, got {self.rounds}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def check(self, format: Format) -> None:
        """Raise UserError where a block has no stored scale of its own."""
        grid: Any = format  # hashable, which its protocol cannot say
        if not _has_neighbours(grid):
            raise UserError(
                f"neighbours: no block of {format.name} has a scale of its own whose neighbours could be tried; leave "
                "the stage out, or take refit(), which solves for the scales there are"
            )

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H = metric(state, stats)

        def one_round(_: Array, now: tuple[State, Array]) -> tuple[State, Array]:
            return keep_better(now[0], moved(now[0], format, H), format, now[1], H)

        return lax.fori_loop(0, self.rounds, one_round, (state, losses(state, format, H)))[0]


def neighbours(rounds: int = 1) -> Neighbours:
    """Each block's stored scale moved to a neighbour, its codes with it, where the loss falls; never a larger loss.

    Args:
      rounds: passes over all blocks; each moves a scale by one step.
    """
    return Neighbours(rounds)


def moved(state: State, format: Format, H: Float[Array, "n n"]) -> State:
    """The state with every group, from the first to the last, at the best of its scale's neighbours."""
    scales, codes, e = state.scales, state.codes, errors_of(state, format)
    assert scales is not None and codes is not None and isinstance(format, Stepped)
    (rows, n), tile = e.shape, format.tile[1]
    grids = [format.columns(scales, e.shape), *format.neighbours(scales, e.shape)]
    groups, count = grids[0][0].shape[1], len(grids)
    size = n // groups
    width, here = min(outer_of(tile), size), jnp.arange(size)

    def by_group(a: Array) -> Array:
        """[rows, groups x, ...] -> [groups, rows, x, ...]."""
        return jnp.moveaxis(a.reshape(rows, groups, -1), 1, 0)

    def each(a: Array) -> Array:
        """[size, rows], once for each grid: [size, count rows]."""
        return jnp.tile(a, (1, count))

    def one_group(e: Array, at: tuple) -> tuple[Array, tuple[Columns, Array]]:
        g, w, tried, codes, mask = at
        H_g = lax.dynamic_slice_in_dim(H, g * size, size, 0)
        H_gg = lax.dynamic_slice_in_dim(H_g, g * size, size, 1)
        e_g = lax.dynamic_slice_in_dim(e, g * size, size, 0)
        outside = _dot(H_g, e) - _dot(H_gg, e_g)  # what the other groups ask for
        grid = fixed_grid(jax.tree.map(lambda c: c.reshape(-1, 1), tried), here, width)
        pull = over_tiles(outside.T, H_gg, tile).T
        found, tiles, _ = sweep(
            format, each(w), each(e_g), descent(H_gg, tile), grid, width, pull=each(pull), metric=tiles_of(H_gg, tile),
            reach=None if mask is None else each(exactly(mask)),
        )  # fmt: skip

        def loss(e: Array, outside: Array) -> Array:
            """What of e H e^T the group decides, summed over the rows that go together: f32[x, rows]."""
            by_row = jnp.sum(e * (_dot(H_gg, e) + 2.0 * outside), axis=0).reshape(-1, rows // tied, tied)
            return jnp.repeat(jnp.sum(by_row, axis=2), tied, axis=1)

        after, row = loss(found, each(outside)), jnp.arange(rows)
        best = jnp.argmin(after, axis=0)
        better = after[best, row] < loss(e_g, outside)[0]
        new = found.reshape(size, count, rows)[:, best, row]
        new_codes = in_place(tiles, here, tile).reshape(count, rows, -1)[best, row]
        columns = jax.tree.map(lambda c: jnp.where(better, c[best, row], c[0]), tried)
        e = lax.dynamic_update_slice_in_dim(e, jnp.where(better, new, e_g), g * size, 0)
        return e, (columns, jnp.where(better[:, None], new_codes, codes))

    tied = format.rows or rows
    mask = None if state.outliers is None else state.outliers[0]
    tried = jax.tree.map(lambda *c: jnp.moveaxis(jnp.stack(c), 2, 0), *grids)  # [groups, count, rows]
    parts = (
        jnp.arange(groups), state.target.T.reshape(groups, size, rows), tried, by_group(codes),
        None if mask is None else mask.T.reshape(groups, size, rows),
    )  # fmt: skip
    e_new, (columns, codes_new) = lax.scan(one_group, e.T, parts)
    scales = format.store(scales, jax.tree.map(lambda c: c.T, columns))
    outliers = None if mask is None else (mask, state.target - e_new.T)
    codes = jnp.moveaxis(codes_new, 0, 1).reshape(codes.shape)
    return dataclasses.replace(state, scales=scales, codes=codes, outliers=outliers)


@lru_cache(maxsize=256)  # a K-quant's search is long to trace
def _has_neighbours(format: Format) -> bool:
    if not isinstance(format, Stepped):
        return False

    def near(w: Array) -> tuple[Columns, ...]:
        return format.neighbours(format.fit(w), w.shape)

    shape = jax.ShapeDtypeStruct((format.rows or 1, format.block or format.tile[1]), jnp.float32)
    return bool(jax.eval_shape(near, shape))


def _dot(a: Array, b: Array) -> Array:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST)
