"""Parts of a model rounded for a look: any format, by a recipe that a float model's statistics suffice for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.budget.forward import Runs
from qjax.calibrate import observe
from qjax.errors import UserError
from qjax.evaluate.sizes import named_leaves
from qjax.formats import Format
from qjax.models.stages import Stages
from qjax.pipeline.memory import contracted_axis, quantize_params
from qjax.pipeline.piece import for_embedding
from qjax.plan import Plan, Rule
from qjax.recipes import Recipe
from qjax.recipes.methods import rtn
from qjax.stats import Stats
from qjax.tensor import dequantize

SUFFICES = frozenset({"h", "H", "absmean", "absmax", "samples"})
"""Statistics that one forward pass of the float model gives."""


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for a recipe whose rounding of one weight depends on that of others."""
    beyond = recipe.requires - SUFFICES
    if beyond or recipe.reparams or recipe.shrink or recipe.two_sided or recipe.guided:
        what = sorted(beyond) or [r.name for r in recipe.reparams] or ["shrink, two_sided or guided"]
        raise UserError(
            f"the recipe {recipe.name or recipe} cannot try formats one weight at a time: it asks for {what[0]}; take "
            "rtn, imatrix or gptq here, and any recipe to write the file"
        )


def observed(runs: Runs, part: str, x: np.ndarray, recipe: Recipe) -> dict[str, Stats]:
    """{path below the part: statistics} of the inputs of a block's weights, x_i in front of it; or of the head's."""
    stages, kinds = runs.blocks.stages, tuple(sorted(recipe.requires))
    if not kinds:
        return {}
    if part in stages.names:
        block = stages.blocks[stages.names.index(part)]
        return observe(block, runs.params[part], (jnp.asarray(x[at]) for at in runs.steps), kinds)
    if part == "embed" and not stages.tied:
        return {}
    assert runs.hidden is not None
    hidden = (jnp.asarray(runs.hidden[at]) for at in runs.steps)
    seen = observe(partial(_scores, stages), {part: runs.params[part]}, hidden, kinds)
    return {path.partition("/")[2]: s for path, s in seen.items()}


def _scores(stages: Stages, params: Any, n: jax.Array) -> jax.Array:
    return stages.scores(params, n, 0, stages.vocab)


def rounded(
    name: str, formats: Mapping[str, Format], part: Any, stats: Mapping[str, Stats], recipe: Recipe
) -> tuple[Any, int, float]:
    """Some of the weights of a part of a model, rounded; `placed` puts them into it.

    Args:
      name: the part's.
      formats: {path below the part: its format} of the weights that are rounded.
      part: its tree in float32.
      stats: by path below the part.
      recipe: how.

    Returns: those weights, packed; their bytes; their error: the sum of h (w - w_hat)^2, h the mean square of each
      input where it is known and 1 where it is not.
    """
    if not formats:
        return {}, 0, 0.0
    stats = {path: s for path, s in stats.items() if path in formats}
    if name == "embed":
        recipe = for_embedding(recipe) if stats else rtn()
    chosen = _only(part, formats)
    plan = Plan(tuple(Rule(path, format) for path, format in formats.items()))
    packed, report = quantize_params(chosen, plan, stats, recipe=recipe)
    error = jax.tree.map(lambda w, q: w - dequantize(q), chosen, packed)
    total = sum(_weighted(path, e, stats.get(path)) for path, e in named_leaves(error).items())
    return packed, sum(t.nbytes for t in report.tensors), total


def placed(part: Mapping[str, Any], packed: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a model, in float32, with some of its weights as these packed ones have them."""
    return {key: _put(value, packed[key]) if key in packed else value for key, value in part.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Rounder:
    """Rounds a whole model in any formats; the statistics of the float model are gathered once.

    Attributes:
      runs: of the float model, with its baseline.
      recipe: how.
      stats: {part: {path below it: statistics}}.
    """

    runs: Runs
    recipe: Recipe
    stats: dict[str, dict[str, Stats]] = dataclasses.field(default_factory=dict)

    def params(self, formats: Mapping[str, Format]) -> dict[str, Any]:
        """All parts, the weights of these paths in these formats."""
        return {
            name: placed(part, rounded(name, of_part(formats, name), part, self.stats.get(name, {}), self.recipe)[0])
            for name, part in self.runs.params.items()
        }

    def kl(self, formats: Mapping[str, Format], runs: Runs) -> np.ndarray:
        """KL of the rounded model to the floats on the windows of some runs, nats, mean of each: f64[windows]."""
        params = self.params(formats)
        return runs.kl_behind(0, params, runs.first(params))


def of_part(formats: Mapping[str, Format], part: str) -> dict[str, Format]:
    """{path below a part: format} of {path: format}."""
    return {path[len(part) + 1 :]: f for path, f in formats.items() if path.startswith(f"{part}/")}


def _weighted(path: str, e: jax.Array, stats: Stats | None) -> float:
    """The sum of h e^2."""
    if stats is None or stats.importance is None:
        return float(jnp.sum(e * e))
    h = jnp.asarray(stats.importance)
    return float(jnp.sum(e * e * (h if contracted_axis(path, e.ndim) == -1 else h[..., None])))


def _only(tree: Mapping[str, Any], names: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """The leaves of these paths."""
    found = {}
    for key, value in tree.items():
        path = f"{at}{key}"
        inner = _only(value, names, f"{path}/") if isinstance(value, Mapping) else value
        if path in names if not isinstance(value, Mapping) else inner:
            found[key] = inner
    return found


def _put(value: Any, packed: Any) -> Any:
    return placed(value, packed) if isinstance(value, Mapping) else dequantize(packed)
