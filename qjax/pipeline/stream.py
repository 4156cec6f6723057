"""Quantize a model file into a GGUF file, one tensor at a time.

    map a tensor -> encode its blocks on all cores -> write, note in the journal -> drop it

While one tensor is encoded the one before it is written and the next one's pages are fetched. The header is known
before the first weight is read, so tensors have their places from the start, and an interrupted run continues where
it stopped. The file is the same, byte by byte, as that of a run that was never interrupted.

A recipe that needs statistics rounds its weights block by block behind what is rounded already (`walk`); each goes to
its place in the same file as soon as it is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qjax.chain import Chain
from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.io.gguf_model import to_rows
from qjax.io.gguf_types import DENSE
from qjax.io.gguf_write import Layout, TensorInfo, layout, tensor_order
from qjax.models.families import family_of, weight_names
from qjax.models.stages import stages_of
from qjax.pipeline.calibrated import key_of, loader, walk_folder
from qjax.pipeline.encode import CHUNK, Encoding, broken_weights, compile_ahead, encode_tensor, workers
from qjax.pipeline.report import CalibrationReport, Report, TensorReport
from qjax.pipeline.resume import Partial, resumable_file
from qjax.pipeline.rounded import relative_error
from qjax.pipeline.source import Source, SourceTensor, open_source
from qjax.pipeline.walk import Calibration, WeightDone, walk
from qjax.plan import Plan, file_type_number, mix_of
from qjax.plan.named import as_plan, is_mix
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe
from qjax.rounding import check_grid
from qjax.rounding.nearest import Nearest
from qjax.tensor import QTensor

Progress = Callable[[str, int, int], None]
_AHEAD = 3  # tensors in memory: one being encoded, one before it being written, one behind it being fetched
_HEADER = "the header"
_OFTEN_MISSING = ("token_embd.weight", "output.weight")  # llama-imatrix sees no lookup, and the head only if asked


@dataclasses.dataclass(frozen=True)
class _Job:
    """One tensor of the output: where it comes from, what it becomes (format None: its bytes are copied)."""

    tensor: SourceTensor
    info: TensorInfo
    format: Format | None
    kept: str | None
    recipe: Recipe


def quantize_file(
    model: str | Path,
    out: str | Path,
    plan: str | Plan,
    *,
    recipe: str | Recipe | Chain = "rtn",
    calibration: Calibration | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
    requantize: bool = False,
    pre: str | None = None,
    progress: Progress = lambda name, done, total: None,
    walked: Callable[[WeightDone], None] = lambda step: None,
    notify: Callable[[str], None] = lambda message: None,
) -> Report:
    """Quantize a model into a GGUF file that llama.cpp runs, in bounded memory.

    Args:
      model: a Hugging Face directory, a GGUF file, a llama2.c file, or a built-in name.
      out: the file to write. Until it is whole it is called `OUT.partial`; a second call continues it.
      plan: one of llama-quantize's file types ("Q4_K_M"), a format's name, or a Plan.
      recipe: how to round where the plan's rule does not say; a name or a Recipe.
      calibration: the text, for recipes that need statistics; see `calibration_of`.
      importance: {path or GGUF name: f32[in]}, the importance of each input of a weight; others are rounded without.
      pure, overrides: see `qjax.plan.mix`; for a file type only.
      requantize: allow a source whose weights are quantized already.
      pre: llama.cpp's name of the pre-tokenizer, where the tokenizer does not know it.
      progress: called as (tensor, bytes of the source done, of all) after each tensor that is not calibrated.
      walked: called after each tensor that is.
      notify: told in one line when earlier work is continued or dropped, and of a weight without its importance.

    Returns: a Report of every tensor, in the file's order.

    Raises:
      UserError: what `open_source`, `Plan.assign`, `encode_tensor` and `walk` raise; an input that is quantized
        already; a recipe that needs a calibration text and has none; a full disk. Nothing has the final name then.
    """
    source, out, recipe = open_source(model, pre), Path(out), get_recipe(recipe)
    files = {source.path} | {t.file for t in source.tensors if t.values is None}
    if out.exists() and any(out.samefile(file) for file in files):
        raise UserError(f"{out} is the model itself; write to another file")
    importance = _by_gguf_name(source, importance or {})
    if isinstance(plan, str) and is_mix(plan):
        plan = source_mix(source, plan, has_imatrix=bool(importance or recipe.requires), pure=pure, overrides=overrides)
    elif pure or overrides:
        raise UserError("pure and overrides change a file type's choices; a plan says everything itself")
    plan = as_plan(plan, source.config)
    jobs = _jobs(source, plan, recipe, requantize)
    formats = _calibrated(jobs, importance, calibration, notify)
    if plan.note:
        notify(plan.note)
    place = layout(_metadata(source, plan, jobs), [job.info for job in jobs])
    key = _key(source, place, importance, key_of(formats, calibration if formats else None))
    with resumable_file(out, key, place.size, notify) as partial:
        if _HEADER not in partial.finished:
            partial.write(_HEADER, 0, place.header)
        _run([job for job in jobs if job.tensor.weight.path not in formats], place, importance, partial, progress)
        if formats:
            assert calibration is not None
            _walk(source, out, key, jobs, formats, calibration, place, partial, walked, notify)
        return Report(
            tuple(_line(job, partial.finished[job.info.name]) for job in jobs), (plan.note,) if plan.note else ()
        )


def source_mix(source: Source, name: str, **options: Any) -> Plan:
    """A file type's plan for an opened model; options as for `qjax.plan.mix`."""
    c = source.config
    return mix_of(
        name,
        [t.weight for t in source.tensors],
        layers=c.layers,
        heads=c.heads,
        kv_heads=c.kv_heads,
        arch=family_of(c).arch,
        **options,
    )


def _calibrated(
    jobs: Sequence[_Job],
    importance: Mapping[str, np.ndarray],
    calibration: Calibration | None,
    notify: Callable[[str], None],
) -> dict[str, tuple[Format, Recipe]]:
    """{path: (format, recipe)} of the weights that take a walk."""
    formats = {}
    for job in jobs:
        needs = job.recipe.requires - ({"h"} if job.info.name in importance else frozenset())
        if importance and needs == {"h"} and job.info.name in _OFTEN_MISSING:
            notify(f"{job.info.name} is not in the importance matrix; rounded without")
            needs = frozenset()
        simple = len(job.recipe.roundings) == 1 and isinstance(job.recipe.roundings[0], Nearest) and not needs
        if job.format is None or job.kept:
            continue
        if job.recipe.reparams:
            raise UserError(
                f"{job.info.name}: a GGUF file has no place for {job.recipe.reparams[0].name}; fuse it into the "
                "model's weights first, or quantize in memory"
            )
        if simple:
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


def _walk(
    source: Source, out: Path, key: str, jobs: Sequence[_Job], formats: Mapping[str, tuple[Format, Recipe]],
    calibration: Calibration, place: Layout, partial: Partial, walked: Callable[[WeightDone], None],
    notify: Callable[[str], None],
) -> None:  # fmt: skip
    names = {"/".join(w.path): w for w in weight_names(source.config)}
    load = loader(source)

    def emit(path: str, q: QTensor, line: CalibrationReport | None) -> None:
        w = names[path]
        rows = to_rows(w, q, q.format.name)
        whole = load(w.path[0])
        for name in w.path[1:]:
            whole = whole[name]
        note = {"error": relative_error(whole, q), "calibration": None if line is None else dataclasses.asdict(line)}
        partial.write(w.gguf, place.offsets[w.gguf], np.ascontiguousarray(rows).reshape(-1), note)

    with walk_folder(out, key, notify) as folder:
        walk(
            stages_of(source.config), load, formats, calibration, emit,
            folder=folder, kept=lambda path: names[path].gguf in partial.finished, progress=walked, notify=notify,
        )  # fmt: skip


def _jobs(source: Source, plan: Plan, recipe: Recipe, requantize: bool) -> tuple[_Job, ...]:
    tensors = sorted(source.tensors, key=lambda t: tensor_order(t.name))
    assigned = plan.assign(t.weight for t in tensors)
    return tuple(
        _job(source, t, a.format, a.reason, a.recipe or recipe, requantize)
        for t, a in zip(tensors, assigned, strict=True)
    )


def _job(source: Source, t: SourceTensor, fmt: Format | None, reason: str, recipe: Recipe, requantize: bool) -> _Job:
    if fmt is None and t.weight.is_vector and not source.is_gguf:
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
    return _Job(t, info, fmt, kept, recipe)


def _metadata(source: Source, plan: Plan, jobs: Sequence[_Job]) -> dict[str, Any]:
    types: dict[str, int] = {}
    for job in jobs:
        types[job.info.type] = types.get(job.info.type, 0) + int(np.prod(job.info.shape))
    return dict(source.metadata) | {
        "general.quantization_version": 2,
        "general.file_type": file_type_number(plan, types),
    }


def _key(source: Source, place: Layout, importance: Mapping[str, np.ndarray], recipes: str) -> str:
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


def _run(
    jobs: Sequence[_Job],
    place: Layout,
    importance: Mapping[str, np.ndarray],
    partial: Partial,
    progress: Progress,
) -> None:
    total = sum(job.tensor.nbytes for job in jobs)
    done = 0

    def finish(job: _Job, work: Encoding | None) -> None:
        nonlocal done
        name = job.info.name
        if name not in partial.finished:
            raw, error = work.result() if work is not None else (_copied(job.tensor), None)
            partial.write(name, place.offsets[name], raw, None if job.kept else error)
        done += job.tensor.nbytes
        progress(name, done, total)

    pool = ThreadPoolExecutor(workers())
    waiting: list[tuple[_Job, Encoding | None]] = []
    try:
        todo = [job for job in jobs if job.format is not None and job.info.name not in partial.finished]
        compile_ahead(pool, dict.fromkeys(_kind(job, importance) for job in todo))
        for job in jobs:
            work = None
            if job.format is not None and job.info.name not in partial.finished:
                work = encode_tensor(pool, job.info.name, job.tensor.read(), job.format, importance.get(job.info.name))
            waiting.append((job, work))
            if len(waiting) == _AHEAD:
                finish(*waiting.pop(0))
        while waiting:
            finish(*waiting.pop(0))
    finally:
        pool.shutdown(cancel_futures=True)


def _kind(job: _Job, importance: Mapping[str, np.ndarray]) -> tuple[Format, np.dtype, bool]:
    assert job.format is not None
    is_plain = job.tensor.type in DENSE and not job.tensor.add
    dtype = DENSE[job.tensor.type] if is_plain else np.dtype(np.float32)
    return job.format, dtype, job.info.name in importance


def _copied(t: SourceTensor) -> np.ndarray:
    """The bytes of a tensor that is kept, looked through for NaN where its type is a float."""
    raw = t.raw()
    if t.type in ("F32", "F16", "BF16", "F64"):
        values = raw.view(DENSE[t.type])
        bad = sum(int((~np.isfinite(values[at : at + CHUNK])).sum()) for at in range(0, values.size, CHUNK))
        if bad:
            raise broken_weights(t.name, bad)
    return raw


def _line(job: _Job, note: Any) -> TensorReport:
    error, line = note, None
    if isinstance(note, dict):
        error, calibration = note["error"], note["calibration"]
        line = None if calibration is None else CalibrationReport(**calibration)
    return TensorReport(job.info.name, job.info.shape, job.info.type, job.info.nbytes, error, job.kept, line)


def _by_gguf_name(source: Source, importance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {name: t.name for t in source.tensors for name in t.weight.names}
    for name in importance:
        if name not in names:
            raise UserError(f"importance: {source.path} has no tensor called {name!r}")
    return {names[name]: value for name, value in importance.items()}
