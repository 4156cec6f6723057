"""Quantization-aware training of a loaded model, from a plan to a model that is exported.

    finetune       program, start_state and loop.train; then the packed model, checked against what training ran on,
                   bit for bit

A model's heldout loss is always computed from what is packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.models.model import Model, dense_params, running
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.program import faked, forward, measured, packed, program, refreshed, start_state, stored
from qjax.training.grid import weights
from qjax.training.losses.objectives import Apply, cross_entropy
from qjax.training.optim.groups import rates
from qjax.training.run.loop import Loop, Row, train
from qjax.training.run.processes import whole
from qjax.training.run.state import TrainState
from qjax.typing import Array, Int

BatchAt = Callable[[int], Any]


def heldout_loss(apply: Apply, params: Any, windows: Int[np.ndarray, "n t"]) -> float:
    """`mean_loss` of a model; packed weights are decoded first, but for those that round their inputs."""
    return mean_loss(_running(apply), dense_params(params), windows)


@lru_cache(maxsize=64)
def _running(apply: Apply) -> Apply:
    """`running`, the same function for the same `apply`, so that nothing compiles again."""
    return running(apply)


def mean_loss(apply: Apply, params: Any, windows: Int[np.ndarray, "n t"], batch: int = 16) -> float:
    """Mean negative log-likelihood of windows, nats per token, of any function of (params, tokens).

    Raises:
      UserError: no window.
    """
    if not len(windows):
        raise UserError("there is no held-out window to judge by; give at least one")
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    losses = [float(_mean_loss(apply, params, np.asarray(p, np.int32))) * len(p) for p in parts]
    return float(sum(losses) / len(windows))


@partial(jax.jit, static_argnums=0)
@full_float32
def _mean_loss(apply: Apply, params: Any, windows: Array) -> Array:
    return cross_entropy(apply(params, windows[:, :-1]), windows[:, 1:])


def finetune(
    arm: Arm,
    model: Model,
    batch_at: BatchAt,
    loop: Loop,
    out: Path,
    *,
    heldout: np.ndarray,
    rounded: Any = None,
    importance: Mapping[str, Array] | None = None,
    teacher: Model | None = None,
    confidence: float | None = None,
    identity: dict[str, Any] | None = None,
    accumulate: int = 1,
    mixed: bool = True,
    seed: int = 0,
    place: Callable[[Any], Any] = lambda state: state,
    sinks: tuple[Callable[[Row], None], ...] = (),
) -> tuple[Model, list[Row], float]:
    """Train a model in one way; resumes under `out`.

    Args:
      arm: how.
      model: where it starts, with float weights.
      batch_at: step -> {"tokens": i32[b, t + 1]}, and {"cached": ...} where the teacher was cached.
      loop: steps and intervals.
      out: the run's directory.
      heldout: windows [n, t + 1] that judge it.
      rounded: a recipe's result for the model's weights, a tree with QTensors.
      importance: {path: f32[in]}, the mean squared input of each channel, for frozen scales: at the start and at every
        refresh; and for the start of learned ones.
      teacher: a model that runs in the same step; None with a distillation loss: the batch brings its top k.
      confidence: b of cakld.
      identity: further facts that a resumed run must share.
      accumulate, seed: see `make_step`.
      mixed: train with bfloat16 operands; the heldout loss is always in float32.
      place: puts the state where it lives (`sharding.place`).
      sinks: further readers of the log.

    Returns: the model with packed weights, the log, and its heldout loss, computed from what is packed.

    Raises:
      UserError: what the parts raise; stored values that are not those that were trained; quantization that does
        nothing (noise 0).
    """
    needs = arm.losses.taught
    if needs and teacher is None and "cached" not in batch_at(0):
        raise UserError(
            f"arm {arm.name!r}: the loss {arm.losses.terms!r} needs a teacher, or batches with its cached top k"
        )
    if "cakld" in arm.losses.names and confidence is None:
        raise UserError(f"arm {arm.name!r}: cakld needs the teacher's confidence (`teacher_confidence`)")
    if arm.grid.init and rounded is None:
        raise UserError(f"arm {arm.name!r}: init is {arm.grid.init!r}, but no recipe's result was given to start from")
    live = teacher if needs else None
    made = program(
        arm, model.config, loop.steps, None if live is None else live.config, confidence, accumulate, mixed, seed
    )
    state = start_state(
        made, model.params, rounded=rounded, teacher=None if live is None else live.dense, importance=importance
    )  # fmt: skip
    judge = forward(model.config, arm.activations)

    def evaluate(state: TrainState) -> Row:
        return {"heldout": heldout_loss(judge, packed(state, made), heldout)}

    def observe(state: TrainState, before: Any) -> tuple[Row, Any]:
        numbers, codes = measured(state, made)
        row = {k: float(v) for k, v in numbers.items()}
        if not row["quant_noise"] > 0:
            raise UserError(f"arm {arm.name!r}: quantization changes no weight (quant_noise is 0); is it a dense type?")
        return row | ({"flip_rate": float(weights.flip_rate(before, codes))} if before is not None else {}), codes

    state, rows = train(
        place(state), made.step, batch_at, out, loop,
        identity={
            **(identity or {}), "arm": dataclasses.asdict(arm), "steps": loop.steps, "seed": seed,
            "accumulate": accumulate, "mixed": mixed, "confidence": confidence,
        },
        evaluate=evaluate, observe=observe if made.quantizers else None,
        refresh=lambda state: dataclasses.replace(state, kept=refreshed(state.params, state.kept, made)),
        refresh_every=arm.grid.refresh_every if arm.grid.scales == "frozen" else 0,
        describe=lambda at: {f"rate/{k}": float(v) for k, v in rates(made.groups, made.schedule, at).items()},
        name=arm.name, sinks=sinks,
    )  # fmt: skip
    state = whole(state)
    done = packed(state, made)
    if made.quantizers:
        weights.check_same_values(done, faked(stored(state, made), state.kept, made))
    return dataclasses.replace(model, params=done), rows, heldout_loss(judge, done, heldout)
