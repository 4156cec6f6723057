"""Calibrate and quantize a decoder in memory, block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.chain import Chain
from qjax.errors import UserError
from qjax.evaluate.sizes import relative_rmse
from qjax.formats import Format
from qjax.models.model import Model, check_tokens
from qjax.models.stages import stages_of
from qjax.pipeline.encode import check_finite
from qjax.pipeline.report import CalibrationReport, Report, TensorReport
from qjax.pipeline.survey import Survey, survey
from qjax.pipeline.tuned import Tuner
from qjax.pipeline.walk import WeightDone, walk
from qjax.pipeline.windows import Calibration
from qjax.plan import Plan, decoder_weights
from qjax.plan.named import as_plan
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe
from qjax.rounding import check_grid
from qjax.tensor import QTensor, is_qtensor


def quantize_model(
    model: Model,
    plan: str | Format | Plan,
    recipe: str | Recipe | Chain,
    calibration: Calibration,
    *,
    seen: Survey | None = None,
    tune: Tuner | None = None,
    progress: Callable[[WeightDone], None] = lambda step: None,
    notify: Callable[[str], None] = lambda message: None,
) -> tuple[Model, Report]:
    """Calibrate and quantize a decoder in memory, block by block.

    Args:
      model: float weights.
      plan: which weight gets which format, and where its rules say so, which recipe; or a name, see `plan_named`.
      recipe: for the others.
      calibration: the text.
      seen: `survey_model` of the same model and text, so that several recipes need it only once.
      tune, progress, notify: as for `walk`.

    Returns: the model with packed weights, and a report of every weight.

    Raises:
      UserError: weights that are packed already; NaN or Inf in any, kept ones too; what `Plan.assign` and `walk` raise.
    """
    if not isinstance(model, Model):
        raise UserError(
            f"quantize_model takes a Model, as qjax.load gives, got {type(model).__name__}; other trees go to "
            "quantize_params"
        )
    if not isinstance(calibration, Calibration):
        raise UserError(f"quantize_model takes what calibration_text or calibration_of make, got {calibration!r}")
    check_tokens(model.config, calibration.tokens)
    recipe = get_recipe(recipe)
    plan = as_plan(plan, model.config, has_imatrix=bool(recipe.requires))
    assigned = plan.assign(decoder_weights(model.config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"{name}: already quantized to {leaf.format.name}; start from the float model (--requantize)"
            )
    check_finite(model.params)
    formats = {a.weight.path: (a.format, a.recipe or recipe) for a in assigned if a.format is not None}
    for name, (format, made) in formats.items():
        check_grid(made.roundings, format, name)
    if plan.note:
        notify(plan.note)
    params: Any = jax.tree.map(lambda leaf: leaf, model.params)
    lines: dict[str, TensorReport] = {}

    def emit(path: str, leaf: Any, q: QTensor, line: CalibrationReport | None) -> None:
        *folders, name = path.split("/")
        at = params
        for key in folders:
            at = at[key]
        lines[path] = TensorReport(path, _file_shape(q), q.format.name, q.nbytes, relative_rmse(q, leaf), None, line)
        at[name] = q

    told = walk(
        stages_of(model.config), model, formats, calibration, emit,
        seen=seen, tune=tune, progress=progress, notify=notify,
    )  # fmt: skip
    report = [lines[a.weight.path] if a.weight.path in lines else _kept(a, params) for a in assigned]
    notes = tuple(filter(None, (plan.note, *told)))
    return dataclasses.replace(model, params=params), Report(tuple(report), notes)


def survey_model(model: Model, calibration: Calibration, two_sided: bool = True) -> Survey:
    """The float model's pass forwards and backwards that recipes with curvature begin with; with G of all outputs, in
    memory, where one of them is two-sided."""
    return survey(stages_of(model.config), model, calibration, two_sided=two_sided)


def _file_shape(q: QTensor) -> tuple[int, ...]:
    *rest, a, b = q.shape
    return (*rest, b, a) if q.axis == -2 else q.shape


def _kept(a: Any, params: Any) -> TensorReport:
    leaf = params
    for key in a.weight.path.split("/"):
        leaf = leaf[key]
    return TensorReport(a.weight.path, a.weight.shape, jnp.dtype(leaf.dtype).name, leaf.nbytes, kept=a.reason)
