"""Coordinate descent: each column moved to the level that is best while all others stand still.

    w_hat_j <- nearest(w_j + sum_{k != j} e_k H_kj / H_jj)          tr(E H E^T) never grows

Feedback decides each column once, with the columns behind it free; descent looks again with all of them fixed.
Sources: QuIP's greedy passes (arXiv:2307.13304, section 4), LNQ of GuidedQuant (arXiv:2505.07004).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.formats.tiles import bound
from qjax.rounding.curvature import descent, order_of, proxy, tiles_of
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.sweep import fixed_grid, in_place, outer_of, sweep
from qjax.stats import Stats
from qjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Descend(Rounding):
    """See `descend`."""

    sweeps: int = 3

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise UserError(f"descend: sweeps must be at least 1, got {self.sweeps}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H = metric(state, stats)
        new = self.swept(state, format, H)
        if format.tile == (1, 1):  # each step is the best of its column: no need to measure
            return new
        return keep_better(state, new, format, losses(state, format, H), H)[0]

    def swept(self, state: State, format: Format, H: Float[Array, "n n"]) -> State:
        """The state after the passes, whatever its loss."""
        (_, tile), target = format.tile, state.target
        assert state.scales is not None
        order = order_of(jnp.diagonal(H), "act", tile, 1)
        H = H[order][:, order]
        coupling, own = descent(H, tile), tiles_of(H, tile)
        levels = bound(format, state.scales)
        grid = fixed_grid(format.columns(state.scales, target.shape), order, outer_of(tile))
        w, first = target.T[order], errors_of(state, format).T[order]
        reach = None if state.outliers is None else exactly(state.outliers[0]).T[order]

        def once(e: Array) -> tuple[Array, Array]:
            return sweep(levels, w, e, coupling, grid, outer_of(tile), metric=own, reach=reach)[:2]

        codes = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(once, first)[1])
        e, codes = lax.fori_loop(0, self.sweeps, lambda _, now: once(now[0]), (first, codes))
        w_hat = jnp.zeros_like(w).at[order].set(w - e).T
        outliers = None if state.outliers is None else (state.outliers[0], w_hat)
        return dataclasses.replace(state, codes=in_place(codes, order, tile), outliers=outliers)


def descend(sweeps: int = 3) -> Descend:
    """Passes of coordinate descent over all columns, scales fixed."""
    return Descend(sweeps)


def exactly(outliers: Array) -> Float[Array, "rows n"]:
    """The reach (sweep.py) of weights that are outliers and stay that: none for them, no end for the others."""
    return jnp.where(outliers, -1.0, jnp.inf)


def losses(state: State, format: Format, H: Float[Array, "n n"]) -> Float[Array, "units"]:
    """e H e^T of each row, or of the rows that the format holds together."""
    by_row = proxy(errors_of(state, format), H)
    return jnp.sum(by_row.reshape(-1, format.rows or by_row.shape[0]), axis=1)


def keep_better(
    old: State, new: State, format: Format, loss: Float[Array, "units"], H: Float[Array, "n n"]
) -> tuple[State, Float[Array, "units"]]:
    """Of two states the one with less loss, unit by unit, and that loss; `loss` is the old one's."""
    after = losses(new, format, H)
    better = after < loss
    return chosen(old, new, better), jnp.where(better, after, loss)


def chosen(old: State, new: State, better: Array) -> State:
    """`new` in the units of rows where it is better, else `old`; what rows share is one unit."""
    rows = old.target.shape[0]

    def choose(a: Array, b: Array) -> Array:
        take = jnp.repeat(better, rows // better.shape[0]) if b.shape[0] == rows else better
        return jnp.where(take.reshape((-1,) + (1,) * (b.ndim - 1)), b, a)

    assert old.scales is not None and new.scales is not None and old.codes is not None and new.codes is not None
    scales = {k: choose(old.scales[k], new.scales[k]) for k in new.scales}
    outliers = jax.tree.map(choose, old.outliers, new.outliers)
    return dataclasses.replace(new, scales=scales, codes=choose(old.codes, new.codes), outliers=outliers)
