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
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format, Scales
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.rounding.ranges import between, grouped, span
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
        s, m = format.grid(start, w.shape)
        size = w.shape[1] // s.shape[1]
        weight = _weight(self.metric, state, stats, size)

        def candidate(c: Array) -> tuple[Array, Array | None]:
            if m is None:
                return c * s, None
            low, high = span(format, s, m)
            most = c * jnp.maximum(jnp.abs(low), jnp.abs(high))
            return between(format, jnp.clip(low, -most, most), jnp.clip(high, -most, most))

        def rounded(scales: Scales) -> State:
            return dataclasses.replace(state, scales=scales, codes=format.nearest(scales, w))

        def error(state: State) -> Array:
            return group_losses(grouped(errors_of(state, format), s), weight)

        def attempt(now: tuple, c: Array) -> tuple[tuple, None]:
            best, least = now
            new = candidate(c)
            found = error(rounded(format.store(start, *new)))
            best = jax.tree.map(lambda a, b: jnp.where(found < least, a, b), new, best)
            return (best, jnp.minimum(found, least)), None

        count = math.ceil(self.grid * self.shrink)
        factors = 1.0 - jnp.arange(count, dtype=jnp.float32) / self.grid
        before = error(state)
        (best, least), _ = lax.scan(attempt, ((s, m), before), factors)
        scales = format.store(start, *best)
        codes = jnp.where(jnp.repeat(least < before, size, axis=1), format.nearest(scales, w), state.codes)
        return _kept(state, dataclasses.replace(state, scales=scales, codes=codes), format, error)


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
    at = jnp.arange(H.shape[0]).reshape(-1, size)
    return H[at[:, :, None], at[:, None, :]]


def _kept(old: State, new: State, format: Format, error: Callable[[State], Array]) -> State:
    """Row by row the better, where storing one group's scale has moved another's: the whole where rows are tied."""
    assert old.scales is not None and new.scales is not None and old.codes is not None and new.codes is not None
    before, after = jnp.sum(error(old), axis=1), jnp.sum(error(new), axis=1)
    better = after < before if format.row_wise else (jnp.sum(after) < jnp.sum(before))[None]

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape((-1,) + (1,) * (b.ndim - 1)), b, a)

    scales = {k: choose(old.scales[k], new.scales[k]) for k in new.scales}
    return dataclasses.replace(new, scales=scales, codes=choose(old.codes, new.codes))
