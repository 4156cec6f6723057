"""Quantize a model file into a GGUF file, one tensor at a time.

    map a tensor -> encode its blocks on all cores -> write, note in the journal -> drop it

While one tensor is encoded the one before it is written and the next one's pages are fetched. The header is known
before the first weight is read, so tensors have their places from the start, and an interrupted run continues where
it stopped. The file is the same, byte by byte, as that of a run that was never interrupted.

A recipe that needs statistics rounds its weights block by block behind what is rounded already (`walk`); each goes to
its place in the same file as soon as it is done. Several processes (`qjax.processes`) share such a walk, each calling
this with the same arguments; all else is process 0's, which alone writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.chain import Chain
from qjax.compiled import workers
from qjax.errors import UserError
from qjax.evaluate.sizes import relative_rmse
from qjax.formats import BlockFormat, Format
from qjax.io.gguf_model import to_rows
from qjax.io.gguf_types import DENSE
from qjax.io.gguf_write import Layout, layout
from qjax.io.rope_rows import to_halves
from qjax.models.families import WeightName, weight_names
from qjax.models.stages import stages_of
from qjax.pipeline.encode import CHUNK, Encoding, broken_weights, compile_ahead, encode_tensor
from qjax.pipeline.jobs import (
    Job,
    importance_by_name,
    jobs_of,
    key_of_file,
    metadata_of_file,
    source_mix,
    walked_formats,
)
from qjax.pipeline.report import CalibrationReport, Report, TensorReport
from qjax.pipeline.shared import Shared, shared_file, shared_folder
from qjax.pipeline.source import Source, open_source
from qjax.pipeline.source_tensor import SourceTensor
from qjax.pipeline.tuned import Tuner
from qjax.pipeline.walk import WeightDone, walk
from qjax.pipeline.walk_folder import key_of
from qjax.pipeline.windows import Calibration
from qjax.plan import Plan
from qjax.plan.named import as_plan, is_mix
from qjax.processes import check_alike, chief
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe
from qjax.tensor import QTensor

Progress = Callable[[str, int, int], None]
_AHEAD = 3  # tensors in memory: one being encoded, one before it being written, one behind it being fetched
_HEADER = "the header"


def quantize_file(
    model: str | Path,
    out: str | Path,
    plan: str | Format | Plan,
    *,
    recipe: str | Recipe | Chain = "rtn",
    calibration: Calibration | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    pure: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
    requantize: bool = False,
    pre: str | None = None,
    metadata: Mapping[str, Any] = MappingProxyType({}),
    tune: Tuner | None = None,
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
      importance: {path or GGUF name: f32[in]}, the importance of each input of a weight, of a stack f32[experts, in];
        others are rounded without.
      pure, overrides: see `qjax.plan.mix`; for a file type only.
      requantize: allow a source whose weights are quantized already.
      pre: llama.cpp's name of the pre-tokenizer, where the tokenizer does not know it.
      metadata: further keys of the file, as `qjax.io.imatrix.said_of` has them.
      tune: what each block goes through behind its rounding, see `qjax.pipeline.tuned`.
      progress: called as (tensor, bytes of the source done, of all) after each tensor that is not calibrated.
      walked: called after each tensor that is.
      notify: told in one line when earlier work is continued or dropped, and of a weight without its importance.

    Returns: a Report of every tensor, in the file's order.

    Raises:
      UserError: what `open_source`, `Plan.assign`, `encode_tensor` and `walk` raise; an input that is quantized
        already; a recipe that needs a calibration text and has none; a full disk. Nothing has the final name then.
    """
    source, out, recipe = open_source(model, pre), Path(out), get_recipe(recipe)
    files = {source.path} | {t.file for whole in source.tensors for t in whole.pieces if t.values is None}
    if out.exists() and any(out.samefile(file) for file in files):
        raise UserError(f"{out} is the model itself; write to another file")
    importance = importance_by_name(source, importance or {})
    if isinstance(plan, str) and is_mix(plan):
        plan = source_mix(source, plan, has_imatrix=bool(importance or recipe.requires), pure=pure, overrides=overrides)
    elif pure or overrides:
        raise UserError("pure and overrides change a file type's choices; a plan says everything itself")
    plan = as_plan(plan, source.config)
    jobs = jobs_of(source, plan, recipe, requantize)
    formats = walked_formats(jobs, importance, calibration, notify)
    if tune is not None and not any(path.startswith("layers_") for path in formats):
        raise UserError(
            f"recipe {recipe.name or recipe} rounds no block behind its input, so none can be tuned; take gptq or "
            "best_gguf"
        )
    if plan.note:
        notify(plan.note)
    place = layout(metadata_of_file(source, plan, jobs, metadata), [job.info for job in jobs])
    recipes = key_of(formats, calibration if formats else None, tune)
    key = key_of_file(source, place, importance, recipes)
    check_alike(f"{place.header.hex()} {recipes}", "the model, plan, recipe, text or number of cores")
    with shared_file(out, key, place.size, notify) as partial:
        if chief():
            if _HEADER not in partial.finished:
                partial.write(_HEADER, 0, place.header)
            _run([job for job in jobs if job.tensor.weight.path not in formats], place, importance, partial, progress)
        partial.tell()
        told: tuple[str, ...] = ()
        if formats:
            assert calibration is not None
            told = _walk(source, out, key, jobs, formats, calibration, place, partial, tune, walked, notify)
        lines = tuple(_line(job, partial.finished[job.info.name]) for job in jobs)
        return Report(lines, tuple(filter(None, (plan.note, *told))))


def _walk(
    source: Source, out: Path, key: str, jobs: Sequence[Job], formats: Mapping[str, tuple[Format, Recipe]],
    calibration: Calibration, place: Layout, partial: Shared, tune: Tuner | None,
    walked: Callable[[WeightDone], None], notify: Callable[[str], None],
) -> tuple[str, ...]:  # fmt: skip
    names = {"/".join(w.path): w for w in weight_names(source.config)}

    def emit(path: str, leaf: Any, q: QTensor, line: CalibrationReport | None) -> None:
        w = names[path]
        note = {"error": relative_rmse(q, leaf), "calibration": None if line is None else dataclasses.asdict(line)}
        rows = to_rows(w, q, q.format.name)
        partial.write(w.gguf, place.offsets[w.gguf], np.ascontiguousarray(rows).reshape(-1), note)

    earlier = _Earlier({path: names[path] for path in formats}, jobs, place, partial)
    with shared_folder(out, key, notify) as folder:
        return walk(
            stages_of(source.config), source, formats, calibration, emit,
            folder=folder, earlier=earlier, tune=tune, progress=walked, notify=notify,
        )  # fmt: skip


class _Earlier(Mapping[str, QTensor]):
    """Those of some packed weights that the partial file holds, by their paths; each read when it is asked for."""

    def __init__(self, names: Mapping[str, WeightName], jobs: Sequence[Job], place: Layout, partial: Shared):
        self._names, self._place, self._partial = names, place, partial
        self._jobs = {job.info.name: job for job in jobs}

    def __contains__(self, path: object) -> bool:
        return path in self._names and self._names[str(path)].gguf in self._partial.finished

    def __getitem__(self, path: str) -> QTensor:
        w = self._names[path]
        info, format = self._jobs[w.gguf].info, self._jobs[w.gguf].format
        assert isinstance(format, BlockFormat)
        raw = self._partial.read(self._place.offsets[w.gguf], info.nbytes)
        rows = raw.reshape(*info.shape[:-1], info.shape[-1] // format.block, format.block_bytes)
        rows = rows if w.rope_heads is None else to_halves(rows, w.rope_heads)
        return QTensor({"blocks": jnp.asarray(rows)}, format, -2 if w.transposed else -1)

    def __iter__(self) -> Iterator[str]:
        return (path for path in self._names if path in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _run(
    jobs: Sequence[Job],
    place: Layout,
    importance: Mapping[str, np.ndarray],
    partial: Shared,
    progress: Progress,
) -> None:
    total = sum(job.tensor.nbytes for job in jobs)
    done = 0

    def finish(job: Job, work: Encoding | None) -> None:
        nonlocal done
        name = job.info.name
        if name not in partial.finished:
            raw, error = work.result() if work is not None else (_copied(job.tensor), None)
            partial.write(name, place.offsets[name], raw, None if job.kept else error)
        done += job.tensor.nbytes
        progress(name, done, total)

    pool = ThreadPoolExecutor(workers())
    waiting: list[tuple[Job, Encoding | None]] = []
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


def _kind(job: Job, importance: Mapping[str, np.ndarray]) -> tuple[Format, np.dtype, bool]:
    assert job.format is not None
    is_plain = job.tensor.type in DENSE and not job.tensor.add and not job.tensor.decay
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


def _line(job: Job, note: Any) -> TensorReport:
    error, line = note, None
    if isinstance(note, dict):
        error, calibration = note["error"], note["calibration"]
        line = None if calibration is None else CalibrationReport.from_dict(calibration)
    return TensorReport(job.info.name, job.info.shape, job.info.type, job.info.nbytes, error, job.kept, line)
