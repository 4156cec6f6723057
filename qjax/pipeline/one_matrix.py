"""What came of one matrix, and what all ways to round it share: its change of variables, its outliers."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compiled import untuned
from qjax.errors import UserError
from qjax.formats import Format
from qjax.pipeline.parts import Fit, by_parts, in_parts
from qjax.recipes import Recipe
from qjax.reparam import Applied, Site, behind_outputs, reparametrize
from qjax.reparam.inputs import RoundedInput
from qjax.reparam.split import sparse_of
from qjax.rounding import Rounded, round_weight
from qjax.rounding.curvature import two_sided_loss
from qjax.rounding.ldlq import LDLQ, corrected
from qjax.rounding.protocol import factor_of, requires
from qjax.rounding.two_sided import Turns, in_turns
from qjax.stats import Stats
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Shrinkage:
    """How far the statistics were believed, see `CalibrationReport`: H, the cross term and G; NaN where they were not
    shrunk, and where rows stood alone."""

    a: Array
    t: Array
    guarded: Array
    output: Array


jax.tree_util.register_dataclass(Shrinkage)


Made = tuple[Rounded, tuple[Applied, ...], "Shrinkage | None"]


def changed(
    w: Array, format: Format, recipe: Recipe, stats: Stats
) -> tuple[Site, tuple[Applied, ...], tuple[Array, ...]]:
    """The weight and its statistics behind the recipe's changes of variables; see `reparametrize`."""

    def loss(w: Array, stats: Stats) -> Array:
        return round_weight(w, format, recipe.roundings, stats, recipe.damping).error

    kept = requires(recipe.roundings) | ({"H"} if stats.H is not None else frozenset())
    return reparametrize(recipe.reparams, Site(w, stats, format, loss), kept)


def parted(made: Rounded, format: Format, applied: tuple[Applied, ...]) -> tuple[Rounded, tuple[Applied, ...]]:
    """Outliers of the rounding, if it made any, as the innermost split; rounded inputs stay last."""
    if made.outliers is None:
        return made, applied
    mask, values = made.outliers
    part = sparse_of(values, np.asarray(mask), format.decode(made.scales, made.codes))
    last = applied[-1:] if applied and isinstance(applied[-1], RoundedInput) else ()
    return dataclasses.replace(made, outliers=None), (*applied[: len(applied) - len(last)], part, *last)


def aimed(w: Array, format: Format, recipe: Recipe, stats: Stats) -> tuple[Array, Recipe]:
    """The weight that makes up for what its predecessors changed, and the recipe without its cross term."""
    alpha = next((r.cross for r in recipe.roundings if isinstance(r, LDLQ) and r.cross), 0.0)
    if not alpha or stats.cross is None:
        return w, recipe
    stages = tuple(dataclasses.replace(r, cross=0.0) if isinstance(r, LDLQ) else r for r in recipe.roundings)
    grid: Any = format  # hashable, which its protocol cannot say
    target = _moved(w, stats, grid, recipe.roundings, recipe.damping, alpha)
    return target, dataclasses.replace(recipe, roundings=stages)


@partial(untuned, static_argnames=("format", "roundings", "damping", "alpha"))
def _moved(w: Array, stats: Stats, format: Format, roundings: Any, damping: float, alpha: float) -> Array:
    factor = factor_of(roundings, format, stats, damping)
    assert factor is not None
    return corrected(w, stats.cross, alpha, factor.c, factor.order)


@dataclasses.dataclass(frozen=True)
class OutputCurvatures:
    """G of a weight's output in the codes' variables: of used tokens, of held-out ones where some are, and of all."""

    used: Array
    heldout: Array | None
    both: Array


def output_curvatures(
    recipe: Recipe, format: Format, applied: tuple[Applied, ...], shape: tuple[int, ...], used: Stats,
    heldout: Stats | None,
) -> OutputCurvatures | None:  # fmt: skip
    """None where the recipe does not look at it, nobody knows it, or the grid holds rows together."""
    if not recipe.two_sided or used.G is None or not take_turns(format, used.G):
        return None
    here = behind_outputs(applied, used.G, *shape)
    if heldout is None or heldout.G is None:
        return OutputCurvatures(here, None, here)
    there = behind_outputs(applied, heldout.G, *shape)
    assert used.count is not None and heldout.count is not None
    share = used.count / jnp.maximum(used.count + heldout.count, 1.0)
    return OutputCurvatures(here, there, share * here + (1.0 - share) * there)


def take_turns(format: Format, G: Array) -> bool:
    """Whether rows, or sets of them in whole blocks of G, have codes and scales of their own."""
    return format.rows > 0 and G.shape[-1] % format.rows == 0


def rounded_rows(
    w: Array, format: Format, recipe: Recipe, stats: Stats, turns: Turns | None, fit: Fit | None = None
) -> Rounded:
    """`in_parts`; with turns, of the rows of each, half of them at a time."""
    if turns is None:
        return in_parts(w, format, recipe, stats, None, fit)
    if not bool(jnp.all(jnp.isfinite(turns.coupling))):
        raise UserError("G = E[g g^T] of the output is not positive semi-definite, whatever is added to its diagonal")
    rows = len(w) * turns.size // turns.order.shape[1]
    half = -(-rows // 16) * 8  # for two cores, in whole vectors
    return in_turns(w, turns, format, by_parts(w.shape[1], format, recipe, stats, height=half))


def in_metric(made: Rounded, w: Array, e: Array, first: Array | None, H: Any, G: Array | None) -> Rounded:
    """With the losses of errors e, and of those of the first stage where they are known, in H and G."""
    losses = [jnp.float32(jnp.nan) if v is None else two_sided_loss(v, H, G) for v in (w, e, first)]
    return dataclasses.replace(made, **dict(zip(("energy", "error", "first_error"), losses, strict=True)))
