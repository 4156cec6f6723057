"""Coordinate descent: each column moved to the level that is best while all others stand still.

    w_hat_j <- nearest(w_j + sum_{k != j} e_k H_kj / H_jj)          tr(E H E^T) never grows

Feedback decides each column once, with the columns behind it free; descent looks again with all of them fixed.
Sources: QuIP's greedy passes (arXiv:2307.13304, section 4), LNQ of GuidedQuant (arXiv:2505.07004).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.rounding.curvature import descent, order_of, proxy
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.sweep import fixed_grid, outer_of, sweep
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
        if format.tile == 1:  # each step is the best of its column: no need to measure
            return new
        return keep_better(state, new, format, losses(state, format, H), H)[0]

    def swept(self, state: State, format: Format, H: Float[Array, "n n"]) -> State:
        """The state after the passes, whatever its loss."""
        n, tile, target = H.shape[0], format.tile, state.target
        assert state.scales is not None
        s, m = format.grid(state.scales, target.shape)
        order = order_of(jnp.diagonal(H), "act", tile, 1)
        coupling = descent(H, tile)[order][:, order]
        grid_of = fixed_grid(s.T, None if m is None else m.T, order // (n // s.shape[-1]), outer_of(tile))
        w, first = target.T[order], errors_of(state, format).T[order]

        def once(_: Array, e: Array) -> Array:
            return sweep(w, e, coupling, grid_of, format.level, tile, outer_of(tile))[0]

        e = lax.fori_loop(0, self.sweeps, once, first)
        w_hat = jnp.zeros_like(w).at[order].set(w - e).T
        return dataclasses.replace(state, codes=format.nearest(state.scales, w_hat))


def descend(sweeps: int = 3) -> Descend:
    """Passes of coordinate descent over all columns, scales fixed."""
    return Descend(sweeps)


def losses(state: State, format: Format, H: Float[Array, "n n"]) -> Float[Array, "units"]:
    """e H e^T of each row, or of the whole matrix where the format ties its rows together."""
    by_row = proxy(errors_of(state, format), H)
    return by_row if format.row_wise else jnp.sum(by_row)[None]


def keep_better(
    old: State, new: State, format: Format, loss: Float[Array, "units"], H: Float[Array, "n n"]
) -> tuple[State, Float[Array, "units"]]:
    """Of two states the one with less loss, unit by unit, and that loss; `loss` is the old one's."""
    after = losses(new, format, H)
    better = after < loss

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape((-1,) + (1,) * (b.ndim - 1)), b, a)

    assert old.scales is not None and new.scales is not None and old.codes is not None and new.codes is not None
    scales = {k: choose(old.scales[k], new.scales[k]) for k in new.scales}
    kept = dataclasses.replace(new, scales=scales, codes=choose(old.codes, new.codes))
    return kept, jnp.where(better, after, loss)
