"""Codes by annealing, weight by weight: each a mixture of its level and a level beside it, ever closer to one of them.

    L_t = tr(E H E^T) + t sum_ij H_jj v_ij,     E = W - mu        t from 0 to 1
    mu = a + p (b - a),  v = p (1 - p) (b - a)^2,   a, b the levels around mu

It is the loss that relaxed.py has, with one way more to go down: for one weight, all others as they are, the p of least
L_t is known. With u the place of that weight's own target between a and b,

    u = (t_j - a) / (b - a),   t_j = w_j + sum_{k != j} e_k H_kj / H_jj        p = (u - t / 2) / (1 - t), within [0, 1]

which rounds by a slope that grows: not at all at t = 0, to nearest at t = 1, where this is descent (descend.py). As in
successive over-relaxation a weight goes further than there, by omega = 1 + 0.8 sqrt(1 - t) times the way. A round is a
pass over all codes; before every fourth the scales are solved for as the mixtures have them, and stored (units.py). It
costs one product with H, where gradients take hundreds of them to come as far. t = (i / rounds)^(3/2): most weights
settle late. One pass of descent ends it.

Source: the loss and the levels beside are GSQ's (arXiv:2604.18556), see relaxed.py; the way down is ours.
Levels of single weights only: the points of lattices, trellises and importance grids have no next one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format, Tile
from qjax.rounding.descend import Descend, keep_better, losses
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.relaxed import candidates, check_levels, values
from qjax.rounding.units import in_units
from qjax.stats import Stats
from qjax.typing import Array, Float

_POWER = 1.5
_FURTHER = 0.8  # omega - 1 at t = 0
_EVERY = 4  # rounds for one in which scales are solved for, the last for certain
_LEAST = 1e-6  # of 1 - t


@dataclasses.dataclass(frozen=True)
class Annealed(Rounding):
    """See `annealed`."""

    rounds: int = 32

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"annealed: rounds must be at least 1, got {self.rounds}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def check(self, format: Format) -> None:
        """Raise UserError where single weights have no levels beside their own, or no scale."""
        check_levels("annealed", format)

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H, shape = metric(state, stats), state.target.shape
        codes, _ = candidates(state, format)
        bases = tuple(jnp.stack(b, axis=-1) for b in zip(*map(format.basis, codes), strict=True))

        def one_round(i: Array, now: tuple[Any, ...]) -> tuple[Any, ...]:
            e, mixed, scales = now
            coding = Mixed(((i + 1).astype(jnp.float32) / self.rounds) ** _POWER)
            here, solves = dataclasses.replace(state, scales=scales), (self.rounds - 1 - i) % _EVERY == 0
            e, mixed, scales = in_units(e, mixed, coding, here, format, H, 1, solves)
            mean = values(format.columns(scales, shape), [coding.basis(mixed)])[0]  # as it is stored
            missed = state.target - mean
            return missed if state.outliers is None else jnp.where(state.outliers[0], e, missed), mixed, scales

        start = errors_of(state, format), (jnp.zeros(shape, jnp.float32), bases), state.scales
        e, (share, _), scales = lax.fori_loop(0, self.rounds, one_round, start)
        chosen = jnp.where(share > 0.5, 1, jnp.where(share < -0.5, 2, 0))
        found = jnp.take_along_axis(codes, chosen[None], axis=0)[0]
        outliers = None if state.outliers is None else (state.outliers[0], state.target - e)
        new = dataclasses.replace(state, scales=scales, codes=found, outliers=outliers)
        return keep_better(state, Descend(1).swept(new, format, H), format, losses(state, format, H), H)[0]


def annealed(rounds: int = 32) -> Annealed:
    """Codes and scales by annealing from those of the stages before; never a larger loss.

    Args:
      rounds: passes over scales and codes; each costs one product with H. More find better codes.
    """
    return Annealed(rounds)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A `Coding` (units.py): (share f32[rows, n], the K bases of the level, the one above and the one below, f32[rows,
    n, 3] each); a share above 0 is of the level above, one below 0 of the level below.

    Attributes:
      t: f32[].
    """

    t: Array

    def basis(self, codes: Any) -> tuple[Array, ...]:
        """The mixtures', in which they are linear."""
        share, bases = codes
        up, down = jnp.maximum(share, 0.0), jnp.maximum(-share, 0.0)
        return tuple(b[..., 0] + up * (b[..., 1] - b[..., 0]) + down * (b[..., 2] - b[..., 0]) for b in bases)

    def on(self, columns: Columns, codes: Any) -> tuple[Slope, Columns]:
        """The three levels of each weight, and its share."""
        q, above, below = values(columns, [tuple(b[..., c] for b in codes[1]) for c in range(3)])
        return Slope(self.t), (q, above, below, codes[0])

    def moved(self, codes: Any, swept: Array) -> Any:
        """With the shares that were found."""
        return swept, codes[1]


@dataclasses.dataclass(frozen=True)
class Slope:
    """What a sweep rounds mixtures by; its columns are the three levels of each weight, and its share.

    Attributes:
      t: f32[].
    """

    t: Array

    @property
    def tile(self) -> Tile:
        return 1, 1

    def round(
        self, columns: Columns, target: Float[Array, "*c 1 1"], metric: Array | None = None
    ) -> tuple[Float[Array, "*c 1 1"], Float[Array, "*c 1 1"]]:
        """mu, and the share."""
        q, above, below, share = jax.tree.map(lambda c: c[..., None], columns)
        best = best_share(target, q, above, below, self.t)
        omega = 1.0 + _FURTHER * jnp.sqrt(jnp.maximum(1.0 - self.t, 0.0))
        new = jnp.clip(share + omega * (best - share), -1.0, 1.0)
        far = jnp.where(new > 0.0, above, below) - q
        return q + jnp.abs(new) * far, jnp.where(far == 0.0, 0.0, new)


def best_share(target: Array, q: Array, above: Array, below: Array, t: Array) -> Array:
    """The share of least (target - mu)^2 + t v, all f32 of one shape: p of the level above, or -p of the one below."""
    up = target > q
    far = jnp.where(up, above, below) - q
    u = (target - q) / jnp.where(far == 0.0, 1.0, far)
    p = jnp.clip((u - 0.5 * t) / jnp.maximum(1.0 - t, _LEAST), 0.0, 1.0)
    return jnp.where(far == 0.0, 0.0, jnp.where(up, p, -p))  # behind the last level there is none
