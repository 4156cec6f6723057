"""What a GGUF file will hold: every tensor, what it becomes and by which recipe; decided before any work."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.io.gguf_types import DENSE
from qjax.io.gguf_write import Layout, TensorInfo, tensor_order
from qjax.models.families import family_of
from qjax.pipeline.source import Source
from qjax.pipeline.source_tensor import SourceTensor
from qjax.pipeline.windows import Calibration
from qjax.plan import Plan, file_type_number, mix_of
from qjax.recipes import Recipe
from qjax.rounding import check_grid

_OFTEN_MISSING = ("token_embd.weight", "output.weight")  # llama-imatrix sees no lookup, and the head only if asked


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor of the output: where it comes from, what it becomes (format None: its bytes are copied)."""

    tensor: SourceTensor
    info: TensorInfo
    format: Format | None
    kept: str | None
    recipe: Recipe


def source_mix(source: Source, name: str, **options: Any) -> Plan:
    """A file type's plan for an opened model; options as for `qjax.plan.mix`."""
    c = source.config
    return mix_of(
        name,
        [t.weight for t in source.tensors],
        layers=c.layers,
        heads=c.heads,
        kv_heads=c.kv_heads,
        experts=c.experts,
        arch=family_of(c).arch,
        **options,
    )


def jobs_of(source: Source, plan: Plan, recipe: Recipe, requantize: bool) -> tuple[Job, ...]:
    """A job for each tensor, in the order of a GGUF file.

    Args:
      source: the model.
      plan: which format each weight gets.
      recipe: where the plan's rule names none.
      requantize: allow a source whose weights are quantized already.

    Raises:
      UserError: what `Plan.assign` raises; weights that are quantized already.
    """
    tensors = sorted(source.tensors, key=lambda t: tensor_order(t.name))
    assigned = plan.assign(t.weight for t in tensors)
    return tuple(
        _job(source, t, a.format, a.reason, a.recipe or recipe, requantize)
        for t, a in zip(tensors, assigned, strict=True)
    )


def _job(source: Source, t: SourceTensor, fmt: Format | None, reason: str, recipe: Recipe, requantize: bool) -> Job:
    if fmt is None and (t.weight.is_vector or t.weight.spared) and not source.is_gguf:
        fmt = get_format("F32")
    elif fmt is not None and fmt.name == t.type:
        fmt, reason = None, f"is {t.type} already"
    if fmt is not None and t.type not in DENSE and fmt.name not in DENSE and not requantize:
        raise UserError(
            f"{source.path}: {t.name} is {t.type} already; quantizing twice loses more than once from the original "
            "weights: start from those, or allow it: requantize=True, on the command line --requantize"
        )
    kept = reason or None
    if fmt is None and t.is_changed:
        fmt = get_format(t.type)
    info = TensorInfo(t.name, t.weight.shape, t.type if fmt is None else fmt.name)
    return Job(t, info, fmt, kept, recipe)


def walked_formats(
    jobs: Sequence[Job],
    importance: Mapping[str, np.ndarray],
    calibration: Calibration | None,
    notify: Callable[[str], None],
) -> dict[str, tuple[Format, Recipe]]:
    """{path: (format, recipe)} of the weights that take a walk.

    Args:
      jobs: of all tensors.
      importance: {GGUF name: f32[in]}, what is known without one.
      calibration: the text, if there is one.
      notify: told of a weight that goes without its importance.

    Raises:
      UserError: a recipe that a GGUF file has no place for, that its format cannot take, or that lacks its text.
    """
    formats = {}
    for job in jobs:
        needs = job.recipe.requires - ({"h"} if job.info.name in importance else frozenset())
        if importance and needs == {"h"} and job.info.name in _OFTEN_MISSING:
            notify(f"{job.info.name} is not in the importance matrix; rounded without")
            needs = frozenset()
        if job.format is None or job.kept:
            continue
        if job.recipe.reparams:
            raise UserError(
                f"{job.info.name}: a GGUF file has no place for {job.recipe.reparams[0].name}; fuse it into the "
                "model's weights first, or quantize in memory"
            )
        if job.recipe.is_plain and not needs:
            continue
        check_grid(job.recipe.roundings, job.format, job.info.name)
        if calibration is None and needs:
            raise UserError(
                f"{job.info.name}: recipe {job.recipe.name or job.recipe} needs {', '.join(sorted(needs))} of its "
                "input: give a calibration text"
            )
        formats[job.tensor.weight.path] = (job.format, job.recipe)
    if formats and calibration is None:
        raise UserError("this recipe walks the model and needs a calibration text")
    return formats


def metadata_of_file(
    source: Source, plan: Plan, jobs: Sequence[Job], further: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The source's metadata, what the file's types are called as a whole, and what else is to be said."""
    types: dict[str, int] = {}
    for job in jobs:
        types[job.info.type] = types.get(job.info.type, 0) + int(np.prod(job.info.shape))
    return dict(source.metadata) | {
        "general.quantization_version": 2,
        "general.file_type": file_type_number(plan, types),
        **further,
    }


def key_of_file(source: Source, place: Layout, importance: Mapping[str, np.ndarray], recipes: str) -> str:
    """Identifies the output: the same key means the same bytes (docs/reliability.md)."""
    h = hashlib.sha256(place.header)
    h.update(source.fingerprint().encode() + recipes.encode())
    for name in sorted(importance):
        h.update(name.encode() + np.ascontiguousarray(importance[name], np.float32).tobytes())
    for package in ("qjax", "jax"):
        try:
            h.update(version(package).encode())
        except Exception:  # run from a checkout that is not installed
            h.update(b"?")
    return h.hexdigest()


def importance_by_name(source: Source, importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under GGUF names, whatever names they came with; one of no tensor is refused."""
    names = {name: t.name for t in source.tensors for name in t.weight.names}
    for name in importance:
        if name not in names:
            raise UserError(f"importance: {source.path} has no tensor called {name!r}")
    return {names[name]: value for name, value in importance.items()}
