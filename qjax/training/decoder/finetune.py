"""A program run to its end: trained, watched, and exported as what training ran on, bit for bit.

    trained  = program(arm, model.config, run.steps)
    result   = finetune(trained, start_state(trained, model.params), data, run)
    qjax.save(dataclasses.replace(model, params=result.params), "folder")

A held-out loss is always computed from what is packed.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.models.model import Running, dense_params
from qjax.processes import whole
from qjax.training.decoder.program import Program, refresh, statistics, trained_on
from qjax.training.grid import weights
from qjax.training.losses.objectives import Apply, cross_entropy
from qjax.training.run.devices import Data
from qjax.training.run.loop import Hooks, Row, Run, train
from qjax.training.run.state import TrainState
from qjax.typing import Array, Int


def heldout_loss(apply: Apply, params: Any, windows: Int[np.ndarray, "n t"]) -> float:
    """`mean_loss` of a model; packed weights are decoded first, but for those that round their inputs."""
    return mean_loss(Running(apply), dense_params(params), windows)


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


class Finetuned(NamedTuple):
    """What `finetune` returns.

    Attributes:
      params: the tree with packed weights.
      rows: the log.
      loss: held out, of `params`.
      state: the last one.
    """

    params: Any
    rows: list[Row]
    loss: float
    state: TrainState


def finetune(program: Program, state: TrainState, data: Data, run: Run) -> Finetuned:
    """Train in one way; resumes under the run's folder.

    Args:
      program: how.
      state: where it starts (`start_state`).
      data: what it trains on, and the windows that judge it.
      run: how far, and what is logged and saved; of `run.name` that of the arm is made where it has none.

    Raises:
      UserError: what the parts raise; a run of another length than the program's; stored values that are not those that
        were trained; quantization that does nothing (noise 0).
    """
    arm = program.arm
    if run.steps != program.steps:
        raise UserError(f"arm {arm.name!r}: compiled for {program.steps} steps, and the run has {run.steps}")
    if arm.losses.taught and "teacher" not in state.constants and "cached" not in data.batch_at(0):
        raise UserError(
            f"arm {arm.name!r}: the loss {arm.losses.terms!r} needs a teacher, or batches with its cached top k"
        )

    def evaluate(state: TrainState) -> Row:
        return {"heldout": heldout_loss(program.judge, program.export(state), data.heldout)}

    def observe(state: TrainState, before: Any) -> tuple[Row, Any]:
        numbers, codes = statistics(state, program)
        row = {k: float(v) for k, v in numbers.items()}
        if not row["quant_noise"] > 0:
            raise UserError(f"arm {arm.name!r}: quantization changes no weight (quant_noise is 0); is it a dense type?")
        return row | ({"flip_rate": float(weights.flip_rate(before, codes))} if before is not None else {}), codes

    def refreshed(state: TrainState, at: int) -> TrainState:
        return state if at % arm.grid.refresh_every else refresh(state, program)

    hooks = Hooks(
        describe=lambda at: {f"rate/{k}": float(v) for k, v in program.rates(at).items()},
        before=refreshed if arm.grid.refresh_every else None,
        evaluate=evaluate,
        observe=observe if program.through.quantizers else None,
    )
    named = dataclasses.replace(run, name=run.name or arm.name, identity={**run.identity, **program.facts})
    state, rows = train(data.distribute(state), program.step, data.batch_at, named, hooks)
    state = whole(state)
    params = program.export(state)
    if program.through.exact:
        weights.check_same_values(params, trained_on(state, program))
    return Finetuned(params, rows, heldout_loss(program.judge, params, data.heldout), state)
