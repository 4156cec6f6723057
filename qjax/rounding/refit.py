"""Scales refitted in the metric that counts: least squares of tr(E H E^T) over each group's (s, m), codes fixed.

    G = E H      [T H T^T   T H 1^T] [ds]   [G T^T]
                 [1 H T^T   1 H 1^T] [dm] = [G 1^T]       e <- e - ds T - dm            group after group

T are the group's unit levels, H its diagonal block. The solution is rounded to what the format stores before the next
group is looked at, which then makes up for that rounding, and is taken only where the loss with it is smaller. Columns
go in units of about 256; once a unit's scales are done its codes are descended on the new grid (descend.py), with the
same G, so that a round over scales and codes is one product with H.

Source: the H-metric refit of Spherical GPTQ (arXiv:2603.11021) and LNQ's codebook step (arXiv:2505.07004), here as
Gauss-Seidel over groups with an offset, and with scales that are themselves quantized.
"""

from __future__ import annotations

import dataclasses
from math import lcm
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format, Scales
from qjax.rounding.curvature import descent, over_tiles
from qjax.rounding.descend import Descend, keep_better, losses
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.sweep import OUTER, fixed_grid, outer_of, sweep
from qjax.stats import Stats
from qjax.typing import Array, Float

_RIDGE = 1e-4  # a group whose levels are all equal has no slope of its own


@dataclasses.dataclass(frozen=True)
class Refit(Rounding):
    """See `refit`."""

    rounds: int = 3
    sweeps: int = 1

    def __post_init__(self) -> None:
        if min(self.rounds, self.sweeps) < 1:
            raise UserError(f"refit: rounds and sweeps must be at least 1, got {self}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H = metric(state, stats)
        if format.tile == 1 and format.row_wise:  # no step raises a row's loss: no need to measure
            return lax.fori_loop(0, self.rounds, lambda _, state: refitted(state, format, H, self.sweeps), state)

        def one_round(_: Array, now: tuple[State, Array]) -> tuple[State, Array]:
            state, loss = now
            new = refitted(state, format, H, self.sweeps if format.row_wise else 0)
            if not format.row_wise:
                new = Descend(self.sweeps).swept(new, format, H)
            return keep_better(state, new, format, loss, H)

        return lax.fori_loop(0, self.rounds, one_round, (state, losses(state, format, H)))[0]


def refit(rounds: int = 3, sweeps: int = 1) -> Refit:
    """Least squares of the scales in the H metric, then re-rounding; never a larger loss.

    Args:
      rounds: passes over all groups, each followed by its re-rounding.
      sweeps: turns that the scales and the codes of a unit of columns take in a round.
    """
    return Refit(rounds, sweeps)


def refitted(state: State, format: Format, H: Float[Array, "n n"], sweeps: int) -> State:
    """Scales of less loss for the present codes, then codes of less loss on them: one Gauss-Seidel pass over the units.

    Where the format ties rows together, groups are solved as if they were free and stored at the end, codes as they
    were (sweeps is 0).
    """
    scales, e = state.scales, errors_of(state, format)
    assert scales is not None
    rows, n = e.shape
    s, m = format.grid(scales, e.shape)
    groups = s.shape[-1]
    size = n // groups

    # Units of whole blocks, about OUTER columns each; a unit's scales are a slice of every leaf along the row.
    block = format.block or n
    if format.row_wise:  # a super-scale may be the row's, whatever the block
        block = lcm(block, *(n // leaf.shape[1] for leaf in scales.values()))
    count = _units(n, lcm(max(block, size), format.tile))
    per = groups // count
    outer = per * size

    def unit(a: Array) -> Array:
        """[rows, x, ...] -> [count, rows, x / count, ...]."""
        return jnp.moveaxis(a.reshape(rows, count, a.shape[1] // count, *a.shape[2:]), 1, 0)

    def snap(kept: Scales, s: Array, m: Array | None) -> tuple[Scales, Array, Array | None]:
        if not format.row_wise:
            return kept, s, m
        kept = format.store(kept, s, m)
        return kept, *format.grid(kept, (rows, outer))

    def one_group(g: Array, now: tuple, at: tuple) -> tuple:
        moved, kept, s, m = now
        gradient, T_u, H_u = at
        j = g * size
        t = lax.dynamic_slice_in_dim(T_u, j, size, 0)
        H_g = lax.dynamic_slice_in_dim(H_u, j, size, 0)
        grad = lax.dynamic_slice_in_dim(gradient, j, size, 0) + _dot(H_g, moved)
        H_gg = lax.dynamic_slice_in_dim(H_g, j, size, 1)
        Ht = _dot(H_gg, t)
        a, p = jnp.sum(t * Ht, axis=0), jnp.sum(t * grad, axis=0)
        b, c, p1 = jnp.sum(Ht, axis=0), jnp.sum(H_gg), jnp.sum(grad, axis=0)
        ds = jnp.where(a > 0, p / jnp.where(a > 0, a, 1.0), 0.0)
        dm = jnp.zeros_like(ds)
        if m is not None:
            det = a * c - b * b
            ok = det > _RIDGE * a * c
            inverse = jnp.where(ok, 1.0 / jnp.where(ok, det, 1.0), 0.0)
            ds = jnp.where(ok, (p * c - p1 * b) * inverse, ds)
            dm = jnp.where(ok, (p1 * a - p * b) * inverse, dm)
        here = (jnp.arange(per) == g)[None, :]
        moved_m = None if m is None else m + jnp.where(here, dm[:, None], 0.0)
        new, new_s, new_m = snap(kept, s + jnp.where(here, ds[:, None], 0.0), moved_m)
        ds = lax.dynamic_index_in_dim(new_s - s, g, 1, keepdims=False)  # as stored
        dm = jnp.zeros_like(ds) if m is None else lax.dynamic_index_in_dim(new_m - m, g, 1, keepdims=False)
        gain = 2 * (ds * p + dm * p1) - (ds * ds * a + 2 * ds * dm * b + dm * dm * c)
        better = gain > 0

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(better.reshape((-1,) + (1,) * (y.ndim - 1)), x, y), new, old)

        moved = lax.dynamic_update_slice_in_dim(moved, jnp.where(better[None], -(ds[None] * t + dm[None]), 0.0), j, 0)
        return moved, choose(new, kept), choose(new_s, s), choose(new_m, m)

    def levels(w_hat: Array, s: Array, m: Array | None) -> Array:
        s = jnp.repeat(s, size, axis=1).T
        m = None if m is None else jnp.repeat(m, size, axis=1).T
        return jnp.where(s == 0, 0.0, (w_hat if m is None else w_hat - m) / jnp.where(s == 0, 1.0, s))

    def one_unit(e: Array, at: tuple) -> tuple:
        i, w, H_rows, kept, s, m = at
        H_u = lax.dynamic_slice_in_dim(H_rows, i * outer, outer, 1)
        e_u = lax.dynamic_slice_in_dim(e, i * outer, outer, 0)
        outside = _dot(H_rows, e) - _dot(H_u, e_u)  # what the other units ask for
        tile, block = format.tile, min(outer_of(format.tile), outer)
        coupling, pull = descent(H_u, tile), over_tiles(outside.T, H_u, tile).T

        def turn(_: Array, now: tuple) -> tuple:
            e_u, kept, s, m = now
            about = (outside + _dot(H_u, e_u), levels(w - e_u, s, m), H_u)
            start = (jnp.zeros_like(e_u), kept, s, m)
            moved, kept, s, m = lax.fori_loop(0, per, lambda g, now: one_group(g, now, about), start)
            e_u = e_u + moved
            if sweeps:
                grid_of = fixed_grid(s.T, None if m is None else m.T, jnp.arange(outer) // size, block)
                e_u, _ = sweep(w, e_u, coupling, grid_of, format.level, tile, block, pull)
            return e_u, kept, s, m

        e_u, *new = lax.fori_loop(0, max(sweeps, 1), turn, (e_u, kept, s, m))
        return lax.dynamic_update_slice_in_dim(e, e_u, i * outer, 0), new

    kept = jax.tree.map(unit, scales) if format.row_wise else {}
    units = (
        jnp.arange(count), state.target.T.reshape(count, outer, rows), H.reshape(count, outer, n),
        kept, unit(s), None if m is None else unit(m),
    )  # fmt: skip
    swept: tuple[Array, tuple[Scales, Array, Array | None]] = lax.scan(one_unit, e.T, units)
    e_new, (kept, s_new, m_new) = swept

    def whole(a: Array, like: Array) -> Array:
        return jnp.moveaxis(a, 0, 1).reshape(like.shape)

    if format.row_wise:
        scales = jax.tree.map(whole, kept, scales)
    else:
        scales = format.store(scales, whole(s_new, s), None if m is None or m_new is None else whole(m_new, m))
    codes = format.nearest(scales, state.target - e_new.T) if sweeps else state.codes
    return dataclasses.replace(state, scales=scales, codes=codes)


def _units(n: int, block: int) -> int:
    """How many parts of whole blocks, the largest of at most OUTER columns that divide the row."""
    blocks = n // block
    per = max(1, OUTER // block)
    while blocks % per:
        per -= 1
    return blocks // per


def _dot(a: Array, b: Array) -> Array:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST)
