"""What came of one matrix, and what all ways to round it share: its change of variables, its outliers."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from qjax.formats import Format
from qjax.recipes import Recipe
from qjax.reparam import Applied, Site, reparametrize
from qjax.reparam.inputs import RoundedInput
from qjax.reparam.split import sparse_of
from qjax.rounding import Rounded, round_weight
from qjax.rounding.protocol import requires
from qjax.stats import Stats
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Shrinkage:
    """How far the statistics were believed: see `CalibrationReport`."""

    a: Array
    t: Array
    guarded: Array


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
