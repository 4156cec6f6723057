"""A model into another library's checkpoint: what is packed already is taken over, or weights are rounded on the way.

    no plan     packed weights keep codes and scales, in the container's places; one that has none there is refused
    a plan      as `quantize`: a plain recipe weight by weight, a calibrated one by the walk; each goes to its place
                in the folder as soon as it is rounded

In memory are one block's weights; the walk's streams lie in the unfinished folder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.chain import Chain
from qjax.errors import UserError
from qjax.evaluate.sizes import relative_rmse
from qjax.formats import Format, find
from qjax.formats import format as get_format
from qjax.io.exports import container
from qjax.io.exports.container import Container
from qjax.io.gguf_types import DENSE
from qjax.io.onnx_file import ONNX
from qjax.io.packed_folder import PackedFolder, check_packed, packed_folder
from qjax.models.families import WeightName, weight_names
from qjax.models.stages import stages_of
from qjax.pipeline.encode import check_finite
from qjax.pipeline.report import CalibrationReport, Report, TensorReport
from qjax.pipeline.rounded import round_leaf
from qjax.pipeline.source import Source, open_source
from qjax.pipeline.walk import WeightDone, walk
from qjax.pipeline.windows import Calibration
from qjax.plan import Plan, Rule
from qjax.plan.named import as_plan, is_mix
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe
from qjax.rounding import check_grid
from qjax.stats import Stats
from qjax.tensor import QTensor

Formats = Mapping[str, tuple[Format, Recipe]]
DECODED = "decoded: {} packs linear layers only"


def export_model(
    model: str | Path,
    out: str | Path,
    to: str,
    plan: str | Format | Plan | None = None,
    *,
    recipe: str | Recipe | Chain = "rtn",
    calibration: Calibration | None = None,
    requantize: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    walked: Callable[[WeightDone], None] = lambda step: None,
    notify: Callable[[str], None] = lambda message: None,
) -> Report:
    """Write a model as a folder of another library's.

    Args:
      model: a Hugging Face directory, also one of another container, a GGUF file, a llama2.c file, a built-in name.
      out: the folder to write; it appears when it is whole.
      to: the container, one of `qjax.io.exports.CONTAINERS`.
      plan: which weight gets which format, or a format's name, for all that the container packs; None: packed weights
        are taken over as they are.
      recipe: how to round, where the plan's rule does not say.
      calibration: the text, for recipes that need statistics.
      requantize: allow a plan for a model whose weights are quantized already.
      progress: called as (weight, weights done, of all).
      walked: called after each weight that is calibrated.
      notify: told in one line what is going on.

    Returns: a Report of every weight.

    Raises:
      UserError: a format, a group, values or a change of variables that the container has no place for; what
        `open_source`, `Plan.assign` and `walk` raise. Nothing has the final name then.
    """
    source, into = open_source(model), container(to)
    config, names = source.config, {"/".join(w.path): w for w in weight_names(source.config)}
    kept: dict[str, str] = {}
    if plan is None:
        recipes: Formats = {}
        formats, kept = _as_they_are(source, into)
    else:
        recipes, kept = _planned(source, into, plan, get_recipe(recipe), requantize)
        formats = {path: format for path, (format, _) in recipes.items()}
    check_packed(into, config, formats)
    by_walk = {p: fr for p, fr in recipes.items() if fr[1].requires}
    if by_walk and calibration is None:
        needs = sorted(frozenset().union(*(r.requires for _, r in by_walk.values())))
        raise UserError(f"recipe {recipe} looks at what the model does with a text ({', '.join(needs)}); give one")
    lines: dict[str, TensorReport] = {}
    decoded = any(source.type_of(w) not in DENSE for path, w in names.items() if path not in formats)
    dtype = "float32" if decoded or into.name == ONNX else source.card.dtype or "float32"
    with packed_folder(out, into, source, formats, dtype) as folder:

        def emit(path: str, leaf: Any, q: QTensor, line: CalibrationReport | None) -> None:
            error = None if leaf is None else relative_rmse(q, leaf)
            nbytes = folder.packed(names[path], dataclasses.replace(q, axis=-1))
            tell(TensorReport(path, names[path].file_shape, q.format.name, nbytes, error, None, line))

        def tell(line: TensorReport) -> None:
            lines[line.name] = line
            if line.name not in by_walk:
                progress(line.name, len(lines), len(names))

        told: tuple[str, ...] = ()
        if by_walk:
            assert calibration is not None
            with folder.scratch() as streams:
                told = walk(
                    stages_of(config), source, by_walk, calibration, emit,
                    folder=streams, progress=walked, notify=notify,
                )  # fmt: skip
        for path in formats:
            if path not in by_walk:
                _one(source, names[path], recipes.get(path), emit)
        _floats(source, folder, [w for path, w in names.items() if path not in formats], dtype, kept, tell)
    return Report(tuple(lines[path] for path in names), told)


def _one(source: Source, w: WeightName, how: tuple[Format, Recipe] | None, emit: Callable[..., None]) -> None:
    """A weight that is not calibrated: taken over, or rounded."""
    path = "/".join(w.path)
    if how is None:
        q = source.packed(w)
        assert q is not None
        return emit(path, None, q, None)
    leaf = source.leaf(w)
    return emit(path, leaf, round_leaf(path, leaf, -2 if w.transposed else -1, *how, Stats())[0], None)


def _floats(
    source: Source, folder: PackedFolder, weights: list[WeightName], dtype: str, kept: Mapping[str, str],
    tell: Callable[[TensorReport], None],
) -> None:  # fmt: skip
    """The weights that stay floats, each read when its turn comes."""

    def made(w: WeightName) -> np.ndarray:
        path, leaf = "/".join(w.path), source.leaf(w)
        check_finite({path: leaf})
        nbytes = math.prod(w.shape) * (4 if dtype == "float32" else 2)
        tell(TensorReport(path, w.file_shape, dtype, nbytes, None, kept[path]))
        return w.turned(leaf)

    folder.floats((w, lambda w=w: made(w)) for w in weights)


def _as_they_are(source: Source, into: Container) -> tuple[dict[str, Format], dict[str, str]]:
    """The formats of a model's packed weights that go over, and why the others stay floats."""
    formats, kept = {}, {}
    for w in weight_names(source.config):
        path, kind = "/".join(w.path), source.type_of(w)
        if kind in DENSE:
            kept[path] = "is no packed weight"
        elif not into.everything and w.path[0] in ("embed", "head"):
            kept[path] = DECODED.format(into.name)
        else:
            formats[path] = get_format(kind)
    if not formats:
        raise UserError(f"{source.path}: its weights are floats; say what they become: --type, as in --type uint4_g128")
    return formats, kept


def _planned(
    source: Source, into: Container, plan: str | Format | Plan, recipe: Recipe, requantize: bool
) -> tuple[Formats, dict[str, str]]:
    """{path: (format, recipe)} of what will be rounded, and why the others stay floats."""
    ours = not isinstance(plan, Plan)
    if isinstance(plan, str) and find(plan.removeprefix("pure:")) is None and is_mix(plan):
        raise UserError(f"{plan} is a mix of GGUF types; `qjax quantize -o OUT.gguf` writes those")
    plan = as_plan(plan)  # a name is a format's here, also where a mix has it too
    weights = {t.weight.path: t for t in source.tensors}
    if ours and not into.everything:
        outside = [p for p in ("embed/embedding", "head/kernel") if p in weights]
        plan = plan.with_rules([Rule(p, "keep") for p in outside])
    formats, kept = {}, {}
    for a in plan.assign(t.weight for t in source.tensors):
        path, how = a.weight.path, a.recipe or recipe
        if a.format is None:
            kept[path] = a.reason
            continue
        if weights[path].type not in DENSE and not requantize:
            raise UserError(
                f"{source.path}: {path} is {weights[path].type} already; leave --type out to take it over as it is, or "
                "allow quantizing twice: --requantize"
            )
        if how.reparams:
            raise UserError(
                f"{path}: {into.name} has no place for {how.reparams[0].name}, which the layer would have to run; "
                "`qjax fuse` folds scales and rotations into the model, and what it writes can be exported"
            )
        check_grid(how.roundings, a.format, path)
        formats[path] = (a.format, how)
    return formats, kept
