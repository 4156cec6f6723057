"""Clipping by search: each group's range is shrunk as long as its output error falls.

    A = max(|low|, |high|)      low_i = max(low, -c_i A)    high_i = min(high, c_i A)      c_i = 1 - i / grid
    codes nearest on the grid of [low_i, high_i]; kept where e_g M_gg e_g^T is least

[low, high] is what the group's grid spans (ranges.py); where it has no offset, s is multiplied by c_i. M_gg is the
group's diagonal block of H (damped), diag(h), or 1. Every candidate is judged as stored: where the format cannot tell
two of them apart they are one. What the groups do to each other is not looked at: the loss of the whole row may rise.

Source: AWQ, arXiv:2306.00978, section 5.1's weight clipping (mit-han-lab/llm-awq, auto_clip.py: grid 20, shrink 0.5),
there on sampled inputs x, whose mean over tokens of (e_g x_g)^2 is this error with H = E[x x^T].
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format, Scales
from qjax.rounding.curvature import tiles_of
from qjax.rounding.descend import chosen
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.ranges import between, shrunk, span
from qjax.stats import Stats
from qjax.typing import Array, Float

Metric = Literal["H", "h", "none"]


@dataclasses.dataclass(frozen=True)
class Clip(Rounding):
    """See `clip`."""

    grid: int = 20
    shrink: float = 0.5
    metric: Metric = "H"

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.shrink <= 1:
            raise UserError(
                f"clip: grid is at least 1 and shrink above 0 and at most 1, got {self.grid}, {self.shrink}"
            )
        if self.metric not in ("H", "h", "none"):
            raise UserError(f"clip: metric is H, h or none, got {self.metric!r}")

    @property
    def ranges_only(self) -> bool:
        """It judges groups on their own, so it must not come behind error feedback."""
        return True

    @property
    def nearest_codes(self) -> bool:
        """Its codes are those of its scales: who chooses them anew loses nothing."""
        return True

    @property
    def requires(self) -> frozenset[str]:
        return frozenset(() if self.metric == "none" else {self.metric})

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        start, w = state.scales, state.target
        assert start is not None and state.codes is not None
        columns = format.columns(start, w.shape)
        groups = columns[0].shape[1]
        weight = _weight(self.metric, state, stats, w.shape[1] // groups)

        def candidate(c: Array) -> Columns:
            def range_of(s: Array, m: Array) -> tuple[Array, Array]:
                low, high = span(format, s, m)
                most = c * jnp.maximum(jnp.abs(low), jnp.abs(high))
                return between(format, jnp.clip(low, -most, most), jnp.clip(high, -most, most))

            return shrunk(format, columns, c, range_of)

        def rounded(scales: Scales) -> State:
            return dataclasses.replace(state, scales=scales, codes=format.nearest(scales, w))

        def error(state: State) -> Array:
            """Of each group, and where tiles span rows of all rows of a tile."""
            by_row = group_losses(errors_of(state, format).reshape(w.shape[0], groups, -1), weight)
            tied = by_row.reshape(-1, format.tile[0], groups).sum(axis=1, keepdims=True)
            return jnp.broadcast_to(tied, (len(tied), format.tile[0], groups)).reshape(by_row.shape)

        def attempt(now: tuple, c: Array) -> tuple[tuple, None]:
            best, least = now
            new = candidate(c)
            found = error(rounded(format.store(start, new)))
            best = jax.tree.map(lambda a, b: jnp.where(found < least, a, b), new, best)
            return (best, jnp.minimum(found, least)), None

        count = math.ceil(self.grid * self.shrink)
        factors = 1.0 - jnp.arange(count, dtype=jnp.float32) / self.grid
        before = error(state)
        (best, least), _ = lax.scan(attempt, ((*columns,), before), factors)
        new = rounded(format.store(start, best))
        assert new.codes is not None
        moved = jnp.repeat(least < before, new.codes.shape[1] // groups, axis=1)
        new = dataclasses.replace(new, codes=jnp.where(moved, new.codes, state.codes))
        # Row by row the better, where storing one group's scale has moved another's.
        losses = (jnp.sum(error(one).reshape(-1, (format.rows or len(w)) * groups), axis=1) for one in (state, new))
        first, last = losses
        return chosen(state, new, last < first)


def clip(grid: int = 20, shrink: float = 0.5, metric: Metric = "H") -> Clip:
    """Shrink each group's range where its error falls, round to nearest again; never a larger error.

    Args:
      grid: steps from the whole range to nothing.
      shrink: the share of these steps that is tried, the whole range first.
      metric: of a group's error: "H" its diagonal block of E[x x^T], "h" E[x^2], "none" the squared error.
    """
    return Clip(grid, shrink, metric)


def group_losses(e: Float[Array, "rows G size"], weight: Array | None) -> Float[Array, "rows G"]:
    """e_g M_gg e_g^T for M of blocks f32[G, size, size], of a diagonal f32[G, size], or of ones (None)."""
    if weight is None:
        return jnp.sum(e * e, axis=-1)
    if weight.ndim == 2:
        return jnp.sum(e * e * weight[None], axis=-1)
    pulled = jnp.einsum("rgi,gij->rgj", e, weight, precision=lax.Precision.HIGHEST)
    return jnp.sum(pulled * e, axis=-1)


def _weight(kind: Metric, state: State, stats: Stats, size: int) -> Array | None:
    if kind == "none":
        return None
    if kind == "h":
        h = stats.importance
        assert h is not None
        return h.reshape(-1, size)
    H = metric(state, stats)
    return tiles_of(H, size)
