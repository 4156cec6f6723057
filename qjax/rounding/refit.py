"""The columns of a grid refitted in the metric that counts: least squares of tr(E H E^T), then descent of the codes.

Scales, offsets and tables for the present codes, codes on what the format stores of them, unit of columns after unit:
see units.py, where the equations are.
"""

from __future__ import annotations

import dataclasses

from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format, TileGrid
from qjax.formats.tiles import bound
from qjax.rounding.descend import Descend, keep_better, losses
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.units import in_units
from qjax.stats import Stats
from qjax.typing import Array, Float


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
        if format.tile == (1, 1) and format.rows == 1:  # no step raises a row's loss: no need to measure
            return lax.fori_loop(0, self.rounds, lambda _, state: refitted(state, format, H, self.sweeps), state)

        def one_round(_: Array, now: tuple[State, Array]) -> tuple[State, Array]:
            state, loss = now
            new = refitted(state, format, H, self.sweeps if format.rows == 1 else 0)
            if format.rows != 1:
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
    """A grid of less loss for the present codes, then codes of less loss on it: one Gauss-Seidel pass over the units.

    Where the format holds rows together, groups are solved as if they were free and stored at the end, codes as they
    were (sweeps is 0).
    """
    assert state.scales is not None
    single = Single(bound(format, state.scales))
    e, codes, scales = in_units(errors_of(state, format), state.codes, single, state, format, H, sweeps)
    outliers = None if state.outliers is None else (state.outliers[0], state.target - e)
    return dataclasses.replace(state, scales=scales, codes=codes, outliers=outliers)


@dataclasses.dataclass(frozen=True)
class Single:
    """Single codes of a format's levels."""

    levels: TileGrid

    def basis(self, codes: Array) -> tuple[Array, ...]:
        """See `Coding`."""
        return self.levels.basis(codes)

    def on(self, columns: Columns, codes: Array) -> tuple[TileGrid, Columns]:
        """See `Coding`."""
        return self.levels, columns

    def moved(self, codes: Array, swept: Array) -> Array:
        """See `Coding`."""
        return swept
