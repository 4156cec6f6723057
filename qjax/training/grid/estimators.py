"""Gradient estimators: what passes back to a weight through the rounding, w -> w_hat = s T + m.

    u = (w - m) / s      T = level(u), its unit level      g = dL/dw_hat      dL/dw = estimator(g, place)

    ste            g                                                Bengio et al., arXiv:1308.3432
    clipped        g where lo <= u <= hi, else 0                    PACT, LSQ: arXiv:1805.06085, 1902.08153
    ewgs(d)        g (1 + d sign(g) (u - T))                        Lee et al., arXiv:2104.00903, equation 6
    trust(k)       g where |u - T| <= k half, else 0                QuEST, arXiv:2502.05003, section 3.2
    soft_round(k)  g k (1 - t^2) / tanh(k),  t = tanh(k v)          the slope of a soft staircase

`half` is half the distance from T to its neighbour on w's side, and v runs from -1 to 1 between two levels. lo, hi are
the first and last unit level, or with reach "cells" half a gap outside of them: there a weight still rounds to its
nearest level. Bounds are inclusive: absmax scales put a weight of every group on the tie, where `jnp.clip` would halve
its gradient. Which w_hat these stand behind does not matter to them: scales refit at each step, frozen, or learned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Format, Scales
from qjax.formats.tiles import tabled
from qjax.rounding.gradient import cells
from qjax.rounding.ranges import by_inverse, ends, gap, level
from qjax.typing import Array, Float

Reach = Literal["levels", "cells"]


@dataclasses.dataclass(frozen=True)
class Position:
    """Where weights lie among the levels of their grid; what is not asked for is not computed.

    Attributes:
      format: its levels.
      w, w_hat: the weights before and after, in groups along the contracted axis, wherever that is: f32[.., G, g, ..].
      s, m: the grid as stored, for each group: f32[.., G, 1, ..]; s is 1 where levels are learned; m is None where
        there is no offset.
    """

    format: Format
    w: Array
    w_hat: Array
    s: Array
    m: Array | None

    @functools.cached_property
    def u(self) -> Array:
        """(w - m) / s, 0 where s is."""
        return self._units(self.w)

    @functools.cached_property
    def T(self) -> Array:
        """The unit level of w_hat."""
        return level(self.format, self._units(self.w_hat))

    def inside(self, reach: Reach) -> Array:
        """Whether u lies between the ends of the grid, which count as inside: bool; all do where s is 0, where weights
        are rounded together, whose levels have no ends, and where levels are learned, which go as far as weights do."""
        if self.format.tile != (1, 1) or tabled(self.format):
            return jnp.ones(self.w.shape, bool)
        lo, hi = cells(self.format) if reach == "cells" else ends(self.format)
        # The ends in the weights' own units: a comparison per weight and no division.
        a, b = (self.s * end + (0.0 if self.m is None else self.m) for end in (lo, hi))
        low = jnp.where(self.s == 0, -jnp.inf, jnp.minimum(a, b))
        high = jnp.where(self.s == 0, jnp.inf, jnp.maximum(a, b))
        return (self.w >= low) & (self.w <= high)

    def neighbour(self) -> Array:
        """The distance from T to the next unit level on u's side; outside of the grid, to the one on the other side."""
        lo, hi = ends(self.format)
        t = self.T
        return gap(self.format, t, ((self.u > t) | (t == lo)) & (t < hi))

    def _units(self, x: Array) -> Array:
        return by_inverse(x if self.m is None else x - self.m, self.s)


def position_of(
    fmt: Format, scales: Scales, w: Float[Array, "*w"], w_hat: Float[Array, "*w"], axis: int = -1
) -> Position:
    """The position of weights on a stored grid, in their own arrangement: nothing of their size is transposed.

    Args:
      fmt: the format.
      scales: as stored.
      w, w_hat: f32.
      axis: the contracted axis.
    """
    shape = (*(n for i, n in enumerate(w.shape) if i != axis % w.ndim), w.shape[axis])
    theta, *_, m = fmt.columns(scales, shape)
    s = jnp.ones_like(theta) if tabled(fmt) else theta
    w, w_hat = (in_groups(x, s.shape[-1], axis) for x in (w, w_hat))
    return Position(fmt, w, w_hat, per_group(s, axis), None if m is None else per_group(m, axis))


def in_groups(x: Float[Array, "*w"], groups: int, axis: int) -> Array:
    """[.., n, ..] -> [.., G, n / G, ..]."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])


def per_group(s: Float[Array, "*b G"], axis: int) -> Array:
    """[*b, G], contracted axis last -> [.., G, 1, ..], where it is."""
    axis %= s.ndim
    return jnp.expand_dims(jnp.moveaxis(s, -1, axis), axis + 1)


def over_groups(x: Array, axis: int) -> Float[Array, "*b G"]:
    """Sums over the weights of each group: [.., G, g, ..] -> [*b, G], contracted axis last."""
    axis %= x.ndim - 1
    return jnp.moveaxis(x.sum(axis=axis + 1), axis, -1)


@runtime_checkable
class Estimator(Protocol):
    """A hashable function from the gradient by w_hat and the place to the gradient by w, in groups as the place is."""

    def __call__(self, g: Array, place: Position) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Ste:
    """Straight through: the gradient as it is, for scales that follow the weights."""

    def __call__(self, g: Array, place: Position) -> Array:
        return g


@dataclasses.dataclass(frozen=True)
class Clipped:
    """Straight through inside the grid, nothing outside: the estimator of learned scales."""

    reach: Reach = "cells"

    def __post_init__(self) -> None:
        if self.reach not in ("levels", "cells"):
            raise UserError(f"clipped: reach must be levels or cells, got {self.reach!r}")

    def __call__(self, g: Array, place: Position) -> Array:
        return jnp.where(place.inside(self.reach), g, 0.0)


@dataclasses.dataclass(frozen=True)
class Ewgs:
    """Element-wise gradient scaling: weights that must move away from their level move further; delta 0 is `ste`."""

    delta: float = 1e-3

    def __post_init__(self) -> None:
        if not self.delta >= 0:
            raise UserError(f"ewgs: delta must not be negative, got {self.delta}")

    def __call__(self, g: Array, place: Position) -> Array:
        return g * (1.0 + self.delta * jnp.sign(g) * (place.u - place.T))


@dataclasses.dataclass(frozen=True)
class Trust:
    """QuEST's trust region: no gradient to weights further from their level than `factor` half gaps."""

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"trust: factor must be positive, got {self.factor}")

    def __call__(self, g: Array, place: Position) -> Array:
        return jnp.where(jnp.abs(place.u - place.T) <= self.factor * 0.5 * place.neighbour(), g, 0.0)


@dataclasses.dataclass(frozen=True)
class SoftRound:
    """A soft staircase's slope: mean 1 over a gap, largest between levels, least on them, 0 outside of the levels."""

    sharpness: float = 2.0

    def __post_init__(self) -> None:
        if not self.sharpness > 0:
            raise UserError(f"soft_round: sharpness must be positive, got {self.sharpness}")

    def __call__(self, g: Array, place: Position) -> Array:
        k = self.sharpness
        # From the middle of the gap in half gaps: -1 and 1 on the levels, 0 on the border between their cells.
        away = 1.0 - 2.0 * jnp.abs(place.u - place.T) / place.neighbour()
        t = jnp.tanh(k * away)
        return jnp.where(place.inside("levels"), g * (k * (1.0 - t * t) / jnp.tanh(jnp.float32(k))), 0.0)


ste, clipped, ewgs, trust, soft_round = Ste, Clipped, Ewgs, Trust, SoftRound

ESTIMATORS: dict[str, Callable[..., Estimator]] = {
    "ste": ste,
    "clipped": clipped,
    "ewgs": ewgs,
    "trust": trust,
    "soft_round": soft_round,
}


def estimator(text: str) -> Estimator:
    """An estimator from a config's word: "ste", "ewgs(0.01)", "clipped(levels)".

    Raises:
      UserError: an unknown name or an argument it does not take.

    >>> estimator("ewgs(0.01)")
    Ewgs(delta=0.01)
    """
    name, _, rest = text.partition("(")
    if name not in ESTIMATORS:
        raise UserError(f"unknown estimator {text!r}; known: {', '.join(ESTIMATORS)}")
    argument = rest.removesuffix(")")
    make = ESTIMATORS[name]
    if not argument:
        return make()
    try:
        return make(argument if name == "clipped" else float(argument))
    except UserError:
        raise
    except (TypeError, ValueError):
        raise UserError(f"estimator {text!r}: {name} does not take {argument!r}") from None
