"""A weight whose groups of rows have an H of their own each: a stack of smaller weights, rounded and joined again.

W [*b, k m, n], H [*b, k, n, n]   ->   W [*b, k, m, n]   ->   scales and codes [*b, k, m, ...]   ->   [*b, k m, ...]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import Format
from qjax.recipes import Recipe
from qjax.rounding import Rounded
from qjax.stats import Stats
from qjax.typing import Array, Float


def row_groups(
    name: str, rows: Float[Array, "*b m n"], format: Format, recipe: Recipe, stats: Stats, heldout: Stats | None
) -> tuple[int, Stats, Stats | None, str]:
    """In how many groups a weight's rows are rounded, 0 for one H of all rows, and the statistics as that wants them.

    Returns: k; the statistics, whose H is the mean over groups where they cannot be told apart; and why that is so, or
      that nobody collected an H for each.

    Raises:
      UserError: H of row groups for a recipe that is not guided, or that are no groups of this weight's rows.
    """
    if stats.H is None or stats.H.ndim <= rows.ndim:
        alone = recipe.guided and stats.H is not None
        return 0, stats, heldout, "one H for all rows: it was not collected for groups of them" if alone else ""
    k, out = stats.H.shape[-3], rows.shape[-2]
    if not recipe.guided:
        raise UserError(f"{name}: H is of {k} groups of rows, and only a recipe that is guided={k} rounds in that")
    if recipe.guided != k or out % k:
        raise UserError(f"{name}: H is of {k} groups of rows, the recipe is guided={recipe.guided}, its rows are {out}")
    if format.rows and out // k % format.rows == 0:
        return k, stats, heldout, ""
    seen = None if heldout is None else _of_all_rows(heldout)
    return 0, _of_all_rows(stats), seen, f"one H for all rows: {format.name} holds rows together"


def folded(rows: Float[Array, "*b rows n"], k: int) -> Float[Array, "*b k m n"] | Float[Array, "*b rows n"]:
    """The groups as a stack; k is 0: as it is."""
    return rows.reshape(*rows.shape[:-2], k, -1, rows.shape[-1]) if k else rows


def unfolded(made: Rounded, lead: int, k: int) -> Rounded:
    """Scales and codes of all rows, behind `lead` axes of a stack; losses are sums over the groups."""
    if not k:
        return made

    def whole(a: Array) -> Array:
        return a.reshape(*a.shape[:lead], -1, *a.shape[lead + 2 :])

    parts = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    rows = {name: jax.tree.map(whole, parts.pop(name)) for name in ("scales", "codes", "outliers")}
    damping = jnp.max(parts.pop("damping"), axis=lead)
    sums: dict[str, Any] = {name: jnp.sum(a, axis=lead) for name, a in parts.items()}
    return Rounded(**rows, damping=damping, **sums)


def _of_all_rows(stats: Stats) -> Stats:
    return dataclasses.replace(stats, H=None if stats.H is None else jnp.mean(stats.H, axis=-3))
