"""What a rounding is: a function that chooses or improves scales and codes of one weight; roundings chain.

    (scales, codes) = round_weight(w, format, (nearest(weight="h"), ldlq(order="act"), refit()), stats)

Each stage sees the problem (weights, format, curvature) and the state the stage before it left. The first stage fits
the scales, and may have its ranges clipped; later ones start from its codes and never make tr(E H E^T) larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.chain import Link
from qjax.compiled import untuned
from qjax.errors import UserError
from qjax.formats.protocol import Format, Scales
from qjax.rounding.curvature import Factor, cholesky, damped, proxy
from qjax.stats import Stats, missing
from qjax.typing import Array, Float, Integer

DAMPING = 0.05
"""lambda of H + lambda diag(H): within 2 % of the best on held-out statistics, and the same for every channel scale."""


Outliers = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a stage leaves behind.

    Attributes:
      scales, codes: as the format understands them. None before the first stage.
      target: what is being rounded, f32[rows, n]: the weight, or the weight corrected for its inputs' errors.
      damping: lambda in force; NaN once H turned out too indefinite for any.
      outliers: weights that are stored exactly beside the codes: which, bool[rows, n], and what as, f32[rows, n].
      factor: of H, for the stage that wants it, where somebody has made it already.
    """

    scales: Scales | None
    codes: Integer[Array, "rows m"] | None
    target: Float[Array, "rows n"]
    damping: Float[Array, ""]
    outliers: Outliers | None = None
    factor: Factor | None = None


class Rounding(Link):
    """A stage: a frozen, hashable record of its parameters. What it does not say of itself is as it stands here."""

    @property
    def name(self) -> str:
        """The function that makes it, as recipes write it."""
        return type(self).__name__.lower()

    @property
    def requires(self) -> frozenset[str]:
        """The statistics it cannot do without: names of `Stats` fields."""
        return frozenset()

    @property
    def fits(self) -> bool:
        """It finds the scales, as the first stage must and no other may."""
        return False

    @property
    def nearest_codes(self) -> bool:
        """Its codes are the nearest to the target on its scales: nothing is lost where they are chosen again."""
        return False

    @property
    def ranges_only(self) -> bool:
        """It looks at each group alone and stands right behind the fit."""
        return False

    @property
    def starts_over(self) -> bool:
        """It keeps the scales that it finds and not the codes."""
        return False

    @property
    def factors(self) -> bool:
        """It factors H, and so finds a damping under which that can be done."""
        return False

    def factored(self, format: Format, H: Float[Array, "n n"], damping: float | Float[Array, ""]) -> Factor:
        """The factor that it wants, of a stage that factors."""
        raise NotImplementedError

    @property
    def whole(self) -> bool:
        """It needs all rows of a weight at once."""
        return False

    def check(self, format: Format) -> None:
        """Raise UserError where it cannot run on a format."""

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        """Choose or improve scales and codes. Pure and jittable."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A rounded weight and what it cost.

    Attributes:
      scales, codes: the result.
      damping: lambda used, f32[]; NaN: H was too indefinite, and the result is not to be used.
      energy: tr(W H W^T), without damping; NaN without H.
      error, first_error: tr(E H E^T) at the end, and after the first stage; E is what is missing from the target: W, or
        with a cross term W corrected for what its input has become.
      heldout_energy, heldout_error, first_heldout_error: the same three in the held-out H.
      outliers: as in `State`; their places in the codes do not count.
    """

    scales: Scales
    codes: Integer[Array, "*b rows m"]
    damping: Float[Array, "*b"]
    energy: Float[Array, "*b"]
    error: Float[Array, "*b"]
    first_error: Float[Array, "*b"]
    heldout_energy: Float[Array, "*b"]
    heldout_error: Float[Array, "*b"]
    first_heldout_error: Float[Array, "*b"]
    outliers: Outliers | None = None

    @property
    def loss(self) -> Float[Array, "*b"]:
        """tr(E H E^T) / tr(W H W^T); 0 where W gives nothing, NaN without H."""
        return _share(self.error, self.energy)

    @property
    def first_loss(self) -> Float[Array, "*b"]:
        """`loss` after the first stage."""
        return _share(self.first_error, self.energy)

    @property
    def heldout_loss(self) -> Float[Array, "*b"]:
        """`loss` in the held-out H."""
        return _share(self.heldout_error, self.heldout_energy)

    @property
    def first_heldout_loss(self) -> Float[Array, "*b"]:
        """`first_loss` in the held-out H."""
        return _share(self.first_heldout_error, self.heldout_energy)


def requires(roundings: Sequence[Rounding]) -> frozenset[str]:
    """The statistics a chain cannot do without."""
    return frozenset().union(*(r.requires for r in roundings))


def check_chain(roundings: Sequence[Rounding], format: Format, stats: Stats, name: str = "the weight") -> None:
    """Raise UserError where a chain cannot run on a weight: no stage, a missing statistic, one of another size."""
    if not roundings:
        raise UserError("a recipe needs at least one rounding, as in nearest()")
    if not roundings[0].fits:
        raise UserError(f"{name}: the first rounding must fit the scales, as nearest() does; {roundings[0]} has none")
    for needed in sorted(requires(roundings)):
        if (stats.importance if needed == "h" else getattr(stats, needed)) is None:
            raise UserError(f"{name}: {missing(needed)}")
    check_grid(roundings, format, name)


def check_grid(roundings: Sequence[Rounding], format: Format, name: str = "the weight") -> None:
    """Raise UserError where stages stand in an order that undoes their work, or cannot run on the format."""
    for i, (before, r) in enumerate(zip((None, *roundings), roundings, strict=False)):
        if before is not None and r.fits:
            raise UserError(f"{name}: {r} fits the scales, which only the first stage may do")
        if r.ranges_only and not (before is not None and before.fits and before.nearest_codes):
            raise UserError(
                f"{name}: {r} looks at each group alone and would undo error feedback; put it behind nearest()"
            )
        if r.starts_over:
            lost = [b for b in roundings[:i] if not b.nearest_codes]
            if lost:
                raise UserError(f"{name}: {r} begins with the weight and would throw away the codes of {lost[-1]}")
        try:
            r.check(format)
        except UserError as e:
            raise UserError(f"{name}: {e}") from None


@partial(untuned, static_argnames=("format", "roundings", "damping"))
def round_weight(
    w: Float[Array, "rows n"],
    format: Format,
    roundings: tuple[Rounding, ...],
    stats: Stats,
    damping: float = DAMPING,
    heldout: Float[Array, "n n"] | None = None,
    factor: Factor | None = None,
    fit: tuple[Scales, Integer[Array, "rows m"]] | None = None,
) -> Rounded:
    """Run a chain of roundings on one weight.

    Args:
      w: rows (out, in), contracted axis last; its length a multiple of the format's block.
      format: the grid.
      roundings: stages, in order.
      stats: what they require; rows of w share it.
      damping: lambda of H + lambda diag(H), at least.
      heldout: H of tokens that `stats` did not see, to report the loss in.
      factor: `factor_of` these, for many parts of a weight's rows; None: made here.
      fit: what the first stage would make, where that is known: the chain begins behind it.

    Returns: scales, codes and losses. Rows are independent of each other unless the format ties them together.

    Raises:
      UserError: what `check_chain` raises: a stage that cannot run on the format, an order that undoes work, a missing
        statistic.
    """
    check_chain(roundings, format, stats)
    w = w.astype(jnp.float32)
    lam = jnp.float32(damping)
    if stats.H is not None and "H" in requires(roundings) and not any(r.factors for r in roundings):
        _, lam = cholesky(stats.H, lam)  # descent alone would not notice an indefinite H
    scales, codes = fit or (None, None)
    state = State(scales, codes, w, lam, factor=factor)
    first = state if fit else None
    for r in roundings[1 if fit else 0 :]:
        state = r(state, format, stats)
        first = state if first is None else first
    assert first is not None and first.scales is not None and first.codes is not None
    assert state.scales is not None and state.codes is not None
    off = (w, errors_of(state, format), state.target - rounded_of(first, format))
    sums: Any = (jnp.float32(jnp.nan) if H is None else jnp.sum(proxy(x, H)) for H in (stats.H, heldout) for x in off)
    return Rounded(state.scales, state.codes, state.damping, *sums, outliers=state.outliers)


def concatenated(made: Sequence[Rounded], rows: Any) -> Rounded:
    """A weight of the parts of its rows.

    Args:
      made: the parts.
      rows: which of the parts' rows, one after the other, stand in the weight: a slice or indices.
    """

    def joined(*leaves: Array) -> Array:
        return jnp.concatenate(leaves)[rows]

    scales, codes, outliers = (
        jax.tree.map(joined, *(getattr(m, field) for m in made)) for field in ("scales", "codes", "outliers")
    )
    sums = ("energy", "error", "first_error", "heldout_energy", "heldout_error", "first_heldout_error")
    damping = jnp.max(jnp.stack([m.damping for m in made]))
    totals = {name: sum((getattr(m, name) for m in made[1:]), getattr(made[0], name)) for name in sums}
    return Rounded(scales, codes, damping, **totals, outliers=outliers)


def factor_of(
    roundings: Sequence[Rounding], format: Format, stats: Stats, damping: float | Float[Array, ""] = DAMPING
) -> Factor | None:
    """The factor of H that a chain asks for: one for all rows of a weight, and for all weights of an input."""
    wants = next((r for r in roundings if r.factors), None)
    return None if wants is None or stats.H is None else wants.factored(format, stats.H, damping)


def _share(error: Array, energy: Array) -> Array:
    return jnp.where(energy > 0, error / jnp.where(energy > 0, energy, 1.0), jnp.where(energy == 0, 0.0, jnp.nan))


def errors_of(state: State, format: Format) -> Float[Array, "rows n"]:
    """target - w_hat."""
    return state.target - rounded_of(state, format)


def rounded_of(state: State | Rounded, format: Format) -> Float[Array, "rows n"]:
    """decode(scales, codes), and the outliers."""
    assert state.scales is not None and state.codes is not None
    w_hat = format.decode(state.scales, state.codes)
    return w_hat if state.outliers is None else jnp.where(*state.outliers, w_hat)


def metric(state: State, stats: Stats) -> Float[Array, "n n"]:
    """The damped H that the state's losses are measured in."""
    assert stats.H is not None
    H = damped(stats.H, state.damping)
    top = jnp.max(jnp.diagonal(H))  # products of two of its entries must stay within float32
    _, exponent = jnp.frexp(jnp.where(top > 0, top, 1.0))
    return jnp.ldexp(H, -exponent)
