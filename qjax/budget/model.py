"""A budget for a model: what it may take, the windows it is measured on, the plans it is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.budget.forward import Runs
from qjax.budget.groups import TARGETS, Group, Target, groups_of, stored_size
from qjax.budget.rounding import Rounder, check_recipe
from qjax.budget.search import Found, Progress, search
from qjax.errors import UserError
from qjax.evaluate.perplexity import Windows
from qjax.models.model import Model
from qjax.plan import FILE_TYPES, Plan, Weight, decoder_weights, mix
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe

UNSCORED = 1 / 8
"""Of a window: the first tokens, which have little in front of them."""


def plan_for(
    model: Model,
    tokens: np.ndarray,
    *,
    bits: float | int | None = None,
    nbytes: float | int | None = None,
    like: str | None = None,
    target: str = "llama.cpp",
    formats: Sequence[str] = (),
    recipe: str | Recipe = "imatrix",
    measured: int = 2,
    mend: bool = True,
    progress: Progress = lambda *_: None,
) -> tuple[Plan, Found]:
    """The plan of least measured KL for a model of so many bytes.

    Args:
      model: the float model.
      tokens: i32[windows, context]; the first half are measured on, the rest tell which plan is best.
      bits: per weight, of the whole model, kept weights included.
      nbytes: of all its tensors, in place of `bits`.
      like: the size of this file type of llama-quantize with an importance matrix, in place of `bits`.
      target: what reads the file: a name of `TARGETS`.
      formats: to choose from, in place of the target's.
      recipe: how weights are rounded while formats are tried.
      measured: formats of a group that are run; the others' costs follow from their errors.
      mend: whether to correct the costs once by what the parts of the whole plan cost together.
      progress: called as (what, done, of all).

    Returns: the plan, a rule a weight; what was measured.

    Raises:
      UserError: none or several of bits, nbytes and like; a budget below the smallest formats; fewer than two windows;
        an unknown target, format or file type; a recipe that cannot try formats one weight at a time.
    """
    if sum(x is not None for x in (bits, nbytes, like)) != 1:
        raise UserError("a budget is said once: bits per weight, bytes, or the file type whose size it has")
    if len(tokens) < 2:
        raise UserError(f"a budget needs two windows of text at least, to measure on and to check; got {len(tokens)}")
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}; there are {', '.join(TARGETS)}")
    reads, made = TARGETS[target], get_recipe(recipe)
    check_recipe(made)
    weights = decoder_weights(model.config)
    groups = groups_of(weights, reads, formats)
    grouped = {w.path for g in groups for w in g.weights}
    kept = [w for w in weights if w.path not in grouped]
    room = _room(model, weights, kept, bits, nbytes, like)
    rounder = Rounder(_runs(model, tokens[: -(-len(tokens) // 2)]), made)
    check = _runs(model, tokens[-(-len(tokens) // 2) :])
    found = search(
        rounder, check, groups, room, _rivals(model, groups, reads, formats), measured=measured, mend=mend,
        progress=progress,
    )  # fmt: skip
    return found.plan([w.path for w in kept if not w.is_vector and not w.spared]), found


def size_of_mix(model: Model, name: str) -> int:
    """Bytes of all tensors in a file type of llama-quantize."""
    assigned = mix(name, model.config, has_imatrix=True).assign(decoder_weights(model.config))
    return sum(stored_size(a.format, a.weight.shape) for a in assigned)


def _room(
    model: Model, weights: Sequence[Weight], kept: Sequence[Weight], bits: float | None, nbytes: float | None,
    like: str | None,
) -> int:  # fmt: skip
    """Bytes that are left for the groups."""
    if like is not None:
        whole = float(size_of_mix(model, like))
    elif bits is not None:
        whole = bits * sum(math.prod(w.shape) for w in weights) / 8
    else:
        assert nbytes is not None
        whole = nbytes
    return math.floor(whole - sum(stored_size(None, w.shape) for w in kept))


def _runs(model: Model, tokens: np.ndarray) -> Runs:
    """A model on windows, behind its first run."""
    names = ("embed", *(f"layers_{i}" for i in range(model.config.layers)), "final_norm", "head")
    params: dict[str, Any] = {name: model.part(name) for name in names if name in model.params}
    windows = Windows(np.asarray(tokens, np.int32), int(UNSCORED * tokens.shape[1]), "budget")
    return Runs(model.config, windows, params).with_baseline()


def _rivals(model: Model, groups: Sequence[Group], target: Target, formats: Sequence[str]) -> dict[str, Any]:
    """{name: {path: format}}: one format for all, and, where llama.cpp reads the file, llama-quantize's mixes."""
    paths = [w.path for g in groups for w in g.weights]
    every = dict.fromkeys(f for g in groups for f in g.formats)
    found: dict[str, Any] = {f.name: dict.fromkeys(paths, f) for f in every if all(f in g.formats for g in groups)}
    if target is not TARGETS["llama.cpp"] or formats:
        return found
    weights = decoder_weights(model.config)
    for name in FILE_TYPES:
        assigned = mix(name, model.config, has_imatrix=True).assign(weights)
        chosen = {a.weight.path: a.format for a in assigned if a.format is not None}
        if chosen.keys() == set(paths) and not any(f.name in ("F32", "F16", "BF16") for f in chosen.values()):
            found[name] = chosen
    return found
