"""Calibrate and quantize a decoder: in memory, or from file to file with the walk's state beside the output.

OUT.partial.calibration/    the residual stream, the survey and how far the walk has come; gone with the partial file
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.chain import Chain
from qjax.errors import UserError
from qjax.io.atomic import write_errors, write_text
from qjax.io.rope_rows import to_halves
from qjax.models.families import WeightName, weight_names
from qjax.models.model import Model, check_tokens
from qjax.models.stages import stages_of
from qjax.pipeline.encode import check_finite, workers
from qjax.pipeline.report import CalibrationReport, Report, TensorReport
from qjax.pipeline.rounded import relative_error
from qjax.pipeline.source import Source, SourceTensor
from qjax.pipeline.survey import Survey
from qjax.pipeline.walk import Calibration, WeightDone, survey_of, walk
from qjax.plan import Plan, decoder_weights
from qjax.plan.named import as_plan
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe
from qjax.rounding import check_grid
from qjax.tensor import QTensor, is_qtensor

HELDOUT = 1 / 8
"""The share of the calibration windows on which losses are reported and nothing is fitted."""


def calibration_of(
    model_context: int, tokens: Any, *, context: int | None = None, limit: int | None = None, heldout: float = HELDOUT,
    batch: int | None = None, seed: int = 0, bos: int | None = None,
) -> Calibration:  # fmt: skip
    """Cut a text into calibration windows.

    Args:
      model_context: the model's longest window.
      tokens: the ids of the text, in order.
      context: tokens a window; None: 512, or the model's if shorter.
      limit: windows at most.
      heldout: the share of the windows that is held out, at the end; at least one window if it is not 0.
      batch: windows a step; None: about 4096 tokens.
      seed: of labels drawn from the model.
      bos: what replaces the first token of each window, where the model expects one.

    Raises:
      UserError: a text shorter than two windows (one, if nothing is held out), a window longer than the model's or
        without a token, a batch without a window.
    """
    context = min(512, model_context) if context is None else context
    if context < 1:
        raise UserError(f"calibration windows need a context of at least one token, got {context}")
    if batch is not None and batch < 1:
        raise UserError(f"a batch needs at least one window, got {batch}")
    if context > model_context:
        raise UserError(
            f"calibration windows of {context} tokens are longer than the model's context of {model_context}"
        )
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is a share of the windows, from 0 to below 1; got {heldout}")
    ids = np.asarray(tokens, np.int32).reshape(-1)
    least = 1 + (heldout > 0)  # windows
    if limit is not None and limit < least:
        raise UserError(
            f"a limit of {limit} calibration windows is too low: {least} are the least"
            + (" (one to calibrate on, one held out)" if heldout else "")
        )
    count = len(ids) // context
    count = count if limit is None else min(count, limit)
    held = max(1, round(heldout * count)) if heldout else 0
    if count - held < 1:
        raise UserError(
            f"the calibration text has {len(ids)} tokens; {least} windows of {context} are the least "
            "(one to calibrate on, one held out): give more text or a shorter context"
        )
    windows = ids[: count * context].reshape(count, context).copy()
    if bos is not None:
        windows[:, 0] = bos
    return Calibration(windows, held, batch or max(1, 4096 // context), seed)


def calibration_text(model: Model, text: str, **options: Any) -> Calibration:
    """`calibration_of` a string, read by the model's tokenizer."""
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer to read the calibration text with; give token ids")
    t = model.tokenizer
    ids = t.encode(text, bos=t.add_bos)
    return calibration_of(model.config.context, ids, bos=t.bos if t.add_bos else None, **options)


def quantize_model(
    model: Model,
    plan: str | Plan,
    recipe: str | Recipe | Chain,
    calibration: Calibration,
    *,
    seen: Survey | None = None,
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
      progress, notify: as for `walk`.

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

    def emit(path: str, q: QTensor, line: CalibrationReport | None) -> None:
        *folders, name = path.split("/")
        at, was = params, model.params
        for key in folders:
            at, was = at[key], was[key]
        lines[path] = TensorReport(
            path, _file_shape(q), q.format.name, q.nbytes, relative_error(was[name], q), None, line
        )
        at[name] = q

    walk(
        stages_of(model.config), _tree_loader(model), formats, calibration, emit,
        seen=seen, progress=progress, notify=notify,
    )  # fmt: skip
    report = [lines[a.weight.path] if a.weight.path in lines else _kept(a, params) for a in assigned]
    return dataclasses.replace(model, params=params), Report(tuple(report), (plan.note,) if plan.note else ())


def survey_model(model: Model, calibration: Calibration) -> Survey:
    """The float model's pass forwards and backwards that recipes with curvature begin with."""
    return survey_of(stages_of(model.config), _tree_loader(model), calibration)


def _tree_loader(model: Model) -> Callable[[str], Any]:
    return lambda name: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model.params[name])


def _file_shape(q: QTensor) -> tuple[int, ...]:
    *rest, a, b = q.shape
    return (*rest, b, a) if q.axis == -2 else q.shape


def _kept(a: Any, params: Any) -> TensorReport:
    leaf = params
    for key in a.weight.path.split("/"):
        leaf = leaf[key]
    return TensorReport(a.weight.path, a.weight.shape, jnp.dtype(leaf.dtype).name, leaf.nbytes, kept=a.reason)


# from file to file


def loader(source: Source) -> Callable[[str], Any]:
    """Parts of a source's params tree by name, read when asked for, as `walk` wants them."""
    tensors = {t.weight.path: t for t in source.tensors}
    parts: dict[str, list[WeightName]] = {}
    for w in weight_names(source.config):
        parts.setdefault(w.path[0], []).append(w)

    def load(name: str) -> Any:
        tree: dict[str, Any] = {}
        for w in parts[name]:
            at = tree
            for key in w.path[1:-1]:
                at = at.setdefault(key, {})
            at[w.path[-1]] = _flax_leaf(tensors["/".join(w.path)], w, source.is_gguf)
        return tree

    return load


def _flax_leaf(t: SourceTensor, w: WeightName, is_gguf: bool) -> jax.Array:
    """A tensor of a file as the decoder holds it: f32, kernels (in, out), rotary rows in halves, no offset."""
    if is_gguf:
        rows = t.read().astype(np.float32)
        rows = rows if w.rope_heads is None else to_halves(rows, w.rope_heads)
        rows = rows - np.float32(w.offset) if w.offset else rows
    else:
        rows = dataclasses.replace(t, rope_heads=None, add=0.0).read().astype(np.float32)
    return jnp.asarray(rows.T if w.transposed else rows)


def key_of(formats: Mapping[str, tuple[Any, Recipe]], calibration: Calibration | None) -> str:
    """Identifies what calibration and recipes make of a model.

    The number of cores is a part: XLA cuts sums over tokens into as many pieces, which shows in the last digits of
    every statistic, and those in the codes.
    """
    h = hashlib.sha256()
    for path in sorted(formats):
        h.update(f"{path} {formats[path][0].name} {formats[path][1]}\n".encode())
    if calibration is not None:
        c = calibration
        where = f"{jax.default_backend()} {platform.machine()} {workers()} cores"
        h.update(f"{c.tokens.shape} {c.heldout} {c.batch} {c.seed} {where}".encode())
        h.update(np.ascontiguousarray(c.tokens, np.int32).tobytes())
    return h.hexdigest()


_OURS = re.compile(r"key|state\.json|survey\.npz|(float_)?(x_)?\d+\.f32(\.unfinished)?|\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def walk_folder(out: Path, key: str, notify: Callable[[str], None] = lambda message: None) -> Iterator[Path]:
    """The folder of a walk's state, empty unless it was left by a walk with the same key.

    It goes when the body ends, and with a UserError or OSError; a kill or an interrupt leaves it.

    Raises:
      UserError: the folder of that name holds something that no walk has left there.
    """
    folder = out.with_name(out.name + ".partial.calibration")
    with write_errors(out):
        _check_ours(folder)
        if folder.is_dir() and not _has_key(folder, key):
            if any(folder.iterdir()):
                notify(f"{folder / 'key'}: of another run, or damaged; starting over")
            shutil.rmtree(folder)
        try:
            folder.mkdir(exist_ok=True)
            if not _has_key(folder, key):
                write_text(folder / "key", key)
            yield folder
        except (UserError, OSError) as e:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(e.__cause__, OSError) and str(folder) in str(e):
                raise e.__cause__ from None  # it speaks of a file in a folder that is gone: say the output's name
            raise
        shutil.rmtree(folder)


def _has_key(folder: Path, key: str) -> bool:
    try:
        return (folder / "key").read_bytes() == key.encode()
    except OSError:
        return False


def _check_ours(folder: Path) -> None:
    """It will be emptied: what is not ours must not be in it."""
    why = "it is no folder" if folder.is_symlink() or (folder.exists() and not folder.is_dir()) else None
    if why is None and folder.is_dir():
        foreign = sorted(name for name in os.listdir(folder) if not _OURS.fullmatch(name))
        why = f"it holds {foreign[0]!r}" if foreign else None
        why = "it belongs to another user" if folder.stat().st_uid != os.geteuid() else why
    if why is not None:
        raise UserError(f"{folder}: needed for unfinished work, and qjax did not make it: {why}; move or delete it")
