"""The loop: steps, a log, checkpoints, and exact resume.

    FOLDER/identity.json  what the run is: whoever continues it must be the same
    FOLDER/metrics.jsonl  one row every `log_every` steps, appended as the run goes
    FOLDER/checkpoints/  orbax, written in the background; the newest two are kept

2 N steps give the same bits as N steps, a kill and N more: the state holds all that a step reads, a batch is a function
of the step, and on resume rows behind the checkpoint are dropped from the log. Losses are looked at one step late, so
that the device never waits for the host; a loss that is no number stops the run before it reaches a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qjax.errors import UserError
from qjax.io.atomic import write_text
from qjax.io.lock import locked
from qjax.processes import chief
from qjax.terminal import bar, say
from qjax.training.run.state import TrainState, TrainStep

Row = dict[str, Any]
LOCK = ".training.lock"  # held while a process trains there


@dataclasses.dataclass(frozen=True)
class Run:
    """How far a run goes, and what it leaves behind.

    Attributes:
      folder: where.
      steps: where the run ends, counted from the state's own step 0.
      log_every: steps between rows of the log.
      eval_every: steps between calls of `Hooks.evaluate`; a multiple of log_every. The last step is always evaluated.
      checkpoint_every: steps between checkpoints; a multiple of log_every. The last step is always saved.
      keep: checkpoints kept.
      name: what the progress bar says.
      identity: facts that must be the same when a run is continued: seeds, the data's hash, the model.
      sinks: further readers of the log, e.g. `tensorboard(folder)`.
    """

    folder: Path
    steps: int
    log_every: int = 20
    eval_every: int = 200
    checkpoint_every: int = 200
    keep: int = 2
    name: str = ""
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sinks: tuple[Callable[[Row], None], ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) % self.log_every:
                raise UserError(f"{name} ({getattr(self, name)}) must be a multiple of log_every ({self.log_every})")


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What is done along the way.

    Attributes:
      before: (state, step) -> state, before every step but step 0; for frozen scales.
      observe: (state, what it returned last or None) -> (numbers, memory), at every row: quantization noise, flips.
      evaluate: called every `eval_every` steps; its numbers join the row.
      describe: the step -> numbers for its row: learning rates, the batch's position.
    """

    before: Callable[[TrainState, int], TrainState] | None = None
    observe: Callable[[TrainState, Any], tuple[Row, Any]] | None = None
    evaluate: Callable[[TrainState], Row] | None = None
    describe: Callable[[int], Row] | None = None


def train(
    state: TrainState, step: TrainStep, batch_at: Callable[[int], Any], run: Run, hooks: Hooks | None = None
) -> tuple[TrainState, list[Row]]:
    """Run to the end, from the newest checkpoint under the run's folder if there is one.

    Args:
      state: where a new run starts; of a resumed one, its shapes, types and shardings.
      step: see `make_step`.
      batch_at: the batch of a step, counted from 0.

    Returns: the last state, and the log.

    Raises:
      UserError: a checkpoint of another run or another model, a damaged file, another process that trains in the
        folder, a loss that is no number.
    """
    out, name, hooks = run.folder, run.name or "train", hooks or Hooks()
    out.mkdir(parents=True, exist_ok=True)
    writes = chief()
    options = ocp.CheckpointManagerOptions(max_to_keep=run.keep, enable_async_checkpointing=True)
    with (
        locked(out / LOCK, f"the training run {out}") if writes else contextlib.nullcontext(),
        _manager(out / "checkpoints", options) as manager,
    ):
        _check_identity(out, state, run.identity)
        first = manager.latest_step() or 0
        if first:
            state = _restored(manager, first, state)
            if writes and first < run.steps:
                say(f"{name}: resuming at step {first} of {run.steps}")
        rows = _rows_until(out / "metrics.jsonl", first, write=writes)
        if writes and first and (not rows or rows[-1]["step"] != first):
            say(f"{out / 'metrics.jsonl'} lacks the rows before step {first}; the log goes on without them")
        memory = hooks.observe(state, None)[1] if hooks.observe else None
        clock, late = time.perf_counter(), None
        with (
            bar(name, done=first, total=run.steps) if writes else contextlib.nullcontext() as show,
            (out / "metrics.jsonl").open("a", encoding="utf-8") as log,
        ):
            for at in range(first, run.steps):
                if hooks.before and at:
                    state = hooks.before(state, at)
                state, metrics = step(state, batch_at(at))
                _check_number(late, at - 1, manager)
                if writes and late is not None:
                    show(at, run.steps, f"loss {float(late):.4f}")
                late = metrics["loss"]
                done = at + 1
                last = done == run.steps
                if done % run.log_every and not last:
                    continue
                for value in metrics.values():  # gradients too: a state that they spoiled must not be saved
                    _check_number(value, at, manager)
                row: Row = {"step": done, **{k: float(v) for k, v in metrics.items()}}
                row |= hooks.describe(at) if hooks.describe else {}
                if hooks.observe:
                    numbers, memory = hooks.observe(state, memory)
                    row |= numbers
                if hooks.evaluate and (last or done % run.eval_every == 0):
                    row |= hooks.evaluate(state)
                row["seconds"] = round(time.perf_counter() - clock, 3)
                rows.append(row)
                if writes:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    for sink in run.sinks:
                        sink(row)
                    show(done, run.steps, f"loss {row['loss']:.4f}")
                if last or done % run.checkpoint_every == 0:
                    manager.save(done, args=ocp.args.StandardSave(_saved(state)))
        manager.wait_until_finished()
    return state, rows


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    try:
        return ocp.CheckpointManager(folder.absolute(), options=options)
    except Exception as e:  # orbax lets through whatever its readers raise
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{folder} is damaged or cannot be used: {why}; give another directory") from None


def _saved(state: TrainState) -> Any:
    """The state as a tree of dicts and arrays: orbax keeps no None and no empty part."""
    return {f.name: value for f in dataclasses.fields(state) if jax.tree.leaves(value := getattr(state, f.name))}


def _restored(manager: ocp.CheckpointManager, step: int, state: TrainState) -> TrainState:
    try:
        back = manager.restore(step, args=ocp.args.StandardRestore(_saved(state)))
        return dataclasses.replace(state, **back)
    except Exception as e:  # orbax lets through whatever its readers raise
        raise UserError(
            f"the checkpoint {manager.directory / str(step)} is damaged or does not fit this model or optimizer: "
            f"{(str(e) or type(e).__name__).splitlines()[0]}; delete that folder to go on from the one before, or give "
            "another directory"
        ) from None


def _check_identity(out: Path, state: TrainState, identity: Mapping[str, Any]) -> None:
    """Write what the run is, or raise UserError with the first fact that differs from what it was."""
    named = jax.tree_util.tree_flatten_with_path(state.params)[0]
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for p, x in named}
    now = json.loads(json.dumps({**identity, "parameters": shapes}))
    path = out / "identity.json"
    if not path.is_file():
        if chief():
            write_text(path, json.dumps(now, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}); give another directory, or delete this one to begin anew") from None
    for where, a, b in _differences(before, now):
        raise UserError(f"{out} holds another run: {where} was {a}, now it is {b}; give another directory")


def _differences(before: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        each = (_differences(before.get(k, "absent"), now.get(k, "absent"), f"{where}.{k}".strip(".")) for k in keys)
        return [d for found in each for d in found]
    return [] if before == now else [(where, before, now)]


def _rows_until(path: Path, step: int, write: bool) -> list[Row]:
    """The rows up to a step; what lies behind it, or was cut off in the middle of a line, leaves the file.

    Raises:
      UserError: another line that is no row; it names file and line.
    """
    rows: list[Row] = []
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            at = int(row["step"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}:{number} is no row of a log; mend or delete the line to go on") from None
        if at > step:
            break
        rows.append(row)
    if write:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _check_number(loss: Any, at: int, manager: ocp.CheckpointManager) -> None:
    if loss is None or math.isfinite(float(loss)):
        return
    manager.wait_until_finished()
    kept = manager.latest_step()
    saved = "no checkpoint was written yet" if kept is None else f"the checkpoint of step {kept} is kept"
    raise UserError(
        f"loss or gradient is {float(loss)} at step {at + 1}: lower the learning rate or the clipping norm; {saved}"
    )


def tensorboard(out: Path) -> Callable[[Row], None]:
    """A sink that writes every number of a row for TensorBoard, under `out`/tensorboard.

    Raises:
      UserError: the package tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: install the package tensorboardX, or leave the option out") from None
    writer = SummaryWriter(str(out / "tensorboard")) if chief() else None

    def sink(row: Row) -> None:
        assert writer is not None, "rows are read by process 0"
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                writer.add_scalar(key, value, row["step"])
        writer.flush()

    return sink
