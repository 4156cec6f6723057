"""A matrix rounded in statistics that are believed as far as held-out tokens ask for (rounding/shrinkage.py).

all tokens choose the change of variables  ->  fit  ->  a, t from used and held-out tokens in the codes' variables
->  the target moves by a share of the cross term  ->  the recipe, in H of all tokens, shrunk; its rows in turns where
held-out G says that they gain (rounding/two_sided.py)  ->  the fit instead, where the held-out output likes that better
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats import Format
from qjax.pipeline.one_matrix import (
    Made,
    OutputCurvatures,
    Shrinkage,
    aimed,
    changed,
    in_metric,
    output_curvatures,
    parted,
    rounded_rows,
)
from qjax.pipeline.parts import in_parts
from qjax.recipes import Recipe
from qjax.reparam import Applied, behind, restore, settle
from qjax.rounding import Rounded, nearest
from qjax.rounding.protocol import rounded_of
from qjax.rounding.shrinkage import Split, output_error, pooled, shares, shrunk
from qjax.rounding.two_sided import WORTH, Turns, turns_for, turns_of
from qjax.stats import Stats
from qjax.typing import Array

FIT = Recipe((nearest("h"),))


def believed(w: Array, format: Format, recipe: Recipe, used: Stats, heldout: Stats, shared: dict[Any, Split]) -> Made:
    """One matrix; its losses are in the statistics that were believed, behind the change of variables."""
    split = _split(used, heldout, recipe.damping, shared)
    site, applied, found = changed(w, format, recipe, pooled(split.used, split.heldout))
    fit = in_parts(site.w, format, FIT, Stats(h=site.stats.importance), None)
    fitted = rounded_of(fit, format)
    a, t = shares(site.w, fitted, format, _behind(applied, split))
    stats = shrunk(site.stats, a, t)
    target, rest = aimed(site.w, format, recipe, stats)
    G = output_curvatures(recipe, format, applied, w.shape, used, heldout)
    turns, share = _turns(site.w - fitted, recipe, format.rows, G)
    begins = (fit.scales, fit.codes) if target is site.w and recipe.roundings[0] == FIT.roundings[0] else None
    made = rounded_rows(target, format, rest, dataclasses.replace(stats, cross=None), turns, begins)
    w_hat = rounded_of(made, format)
    unseen = dataclasses.replace(split.heldout, G=None if G is None else heldout.G)
    there, ours = (float(output_error(w, restore(applied, v), unseen)) for v in (fitted, w_hat))
    if guarded := there < ours:
        made, w_hat, turns = _as_fitted(made, fit), fitted, None
    made = in_metric(made, site.w, target - w_hat, target - fitted, stats.H, None if G is None else G.both)
    applied = settle(applied, found, w_hat)
    share = jnp.float32(jnp.nan if turns is None else share)
    return *parted(made, format, applied), Shrinkage(jnp.float32(a), t, jnp.asarray(guarded), share)


def _turns(e: Array, recipe: Recipe, tied: int, G: OutputCurvatures | None) -> tuple[Turns | None, float]:
    """The turns of rows that pay for themselves on held-out tokens, and how far G is shrunk for them."""
    if G is None or G.heldout is None:
        return None, 0.0
    a, gain, size = turns_for(e, G.used, G.heldout, recipe.two_sided, recipe.damping, tied)
    return None if gain > WORTH else turns_of(G.both, a, size, recipe.damping, tied), a


def _as_fitted(made: Rounded, fit: Rounded) -> Rounded:
    """The fit, without the outliers that a rounding has made."""
    none = None if made.outliers is None else (jnp.zeros_like(made.outliers[0]), made.outliers[1])
    return dataclasses.replace(made, scales=fit.scales, codes=fit.codes, outliers=none)


def _split(stats: Stats, seen: Stats, damping: float, shared: dict[Any, Split]) -> Split:
    """The one that the other weights of this input have made, or a new one; G is not of the input."""
    key = id(stats.H), stats.kinds, damping
    if key not in shared:
        seen = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), dataclasses.replace(seen, G=None))
        shared[key] = Split(dataclasses.replace(stats, G=None), seen, damping)
    return shared[key]


def _behind(applied: tuple[Applied, ...], split: Split) -> Split:
    """The same tokens in the codes' variables."""
    return Split(behind(applied, split.used), behind(applied, split.heldout), split.damping) if applied else split
