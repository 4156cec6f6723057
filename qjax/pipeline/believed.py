"""A matrix rounded in statistics that are believed as far as held-out tokens ask for (rounding/shrinkage.py).

all tokens choose the change of variables  ->  fit  ->  a, t from used and held-out tokens in the codes' variables
->  the recipe, in H and C of all tokens, shrunk  ->  the fit instead, where the held-out output likes that better
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.formats import Format
from qjax.pipeline.one_matrix import Made, Shrinkage, changed, parted
from qjax.pipeline.parts import in_parts
from qjax.recipes import Recipe
from qjax.reparam import Applied, behind, restore, settle
from qjax.rounding import Rounded, nearest
from qjax.rounding.curvature import proxy
from qjax.rounding.protocol import rounded_of
from qjax.rounding.shrinkage import Split, output_error, pooled, shares, shrunk
from qjax.stats import Stats
from qjax.typing import Array

FIT = Recipe((nearest("h"),))


def believed(w: Array, format: Format, recipe: Recipe, used: Stats, heldout: Stats, shared: dict[Any, Split]) -> Made:
    """One matrix; its losses are in the statistics that were believed, behind the change of variables."""
    split = _split(used, heldout, recipe.damping, shared)
    site, applied, found = changed(w, format, recipe, pooled(used, split.heldout))
    fit = in_parts(site.w, format, FIT, Stats(h=site.stats.importance), None)
    fitted = rounded_of(fit, format)
    a, t = shares(site.w, fitted, format, _behind(applied, split))
    stats = shrunk(site.stats, a, t)
    begins = (fit.scales, fit.codes) if recipe.roundings[0] == FIT.roundings[0] else None
    made = in_parts(site.w, format, recipe, stats, None, begins)
    w_hat = rounded_of(made, format)
    errors = (output_error(w, restore(applied, v), split.heldout) for v in (fitted, w_hat))
    there, ours = map(float, errors)
    if guarded := there < ours:
        made, w_hat = _as_fitted(made, fit, site.w - fitted, stats), fitted
    applied = settle(applied, found, w_hat)
    return *parted(made, format, applied), Shrinkage(jnp.float32(a), t, jnp.asarray(guarded))


def _as_fitted(made: Rounded, fit: Rounded, e: Array, stats: Stats) -> Rounded:
    """The fit, with the losses of its errors e, and without the outliers that a rounding has made."""
    assert stats.H is not None
    error = jnp.sum(proxy(e, stats.H))
    none = None if made.outliers is None else (jnp.zeros_like(made.outliers[0]), made.outliers[1])
    return dataclasses.replace(made, scales=fit.scales, codes=fit.codes, error=error, first_error=error, outliers=none)


def _split(stats: Stats, seen: Stats, damping: float, shared: dict[Any, Split]) -> Split:
    """The one that the other weights of this input have made, or a new one."""
    key = id(stats.H), stats.kinds, damping
    if key not in shared:
        shared[key] = Split(stats, jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), seen), damping)
    return shared[key]


def _behind(applied: tuple[Applied, ...], split: Split) -> Split:
    """The same tokens in the codes' variables."""
    return Split(behind(applied, split.used), behind(applied, split.heldout), split.damping) if applied else split
