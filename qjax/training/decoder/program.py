"""What one way to train compiles: its groups, its optimizer and its jitted step; and where its state starts.

    trained     = program(arm, config, steps)             of quantized weights
    trained     = program(arm, config, steps, through=Adapted("qlora"))                  of adapters beside them
    state       = start_state(trained, params, ...)
    state, log  = trained.step(state, batch)
    packed      = trained.export(state)                   the tree that is exported

Whoever trains twice with one program compiles once; nothing is remembered between calls of `program`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.training.adapters.adapted import Adapted
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.forward import Forward
from qjax.training.decoder.quantization import quantizers_of
from qjax.training.grid import weights
from qjax.training.grid.qat import Quantized, float_weights
from qjax.training.losses.objectives import Apply, Objective, Readout, language_loss
from qjax.training.optim.groups import Group, labels, partitioned, rates, restrained
from qjax.training.optim.optimizer import groups_of
from qjax.training.optim.parq import latent
from qjax.training.run.state import TrainState, init_state, make_step
from qjax.typing import Array

Parametrization = Quantized | Adapted  # (params, constants) -> what the forward runs on, and what is exported of it


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a step knows of a teacher.

    Attributes:
      config: the architecture of one that runs in the same step; None: there is none, or batches bring its top k.
      confidence: b of cakld (`teacher_confidence`).
    """

    config: DecoderConfig | None = None
    confidence: float | None = None


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a step is computed.

    Attributes:
      mixed: train on bfloat16 operands and float32 sums; held-out losses are always in float32.
      accumulate, seed: see `make_step`.
    """

    mixed: bool = True
    accumulate: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What one way to train compiles.

    Attributes:
      arm: what it is made of.
      config: of the decoder.
      steps: the length of the run, for its schedules.
      through: which arrays train.
      rates: the step -> {group: learning rate}; {} where the optimizer is the user's.
      optimizer: of the arrays that train.
      step: see `make_step`.
      facts: what a run that is continued must share.
    """

    arm: Arm
    config: DecoderConfig
    steps: int
    through: Parametrization
    rates: Callable[[int], Mapping[str, Array]]
    optimizer: optax.GradientTransformation
    step: Any
    facts: Mapping[str, Any]

    @property
    def judge(self) -> Apply:
        """The model of packed weights whose held-out loss counts, in float32."""
        return Forward(self.config, self.arm.activations)

    def exported(self, state: TrainState) -> Any:
        """The parameters of a state that are exported: the average, latent weights of `prox`, or those that train."""
        if self.arm.optimizer.prox:
            return latent(state.optimizer, state.params)
        return state.params if state.ema is None else state.ema

    def export(self, state: TrainState) -> Any:
        """The tree that is exported."""
        return self.through.packed(self.exported(state), state.constants)


def program(
    arm: Arm,
    config: DecoderConfig,
    steps: int,
    *,
    through: Parametrization | None = None,
    teacher: Teacher | None = None,
    compute: Compute | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Program:
    """What an arm compiles, when its step is first called.

    Args:
      steps: the length of the run, for its schedules.
      through: which arrays train; None: the arm's quantized weights.
      teacher: what is known of one; with a distillation loss and None, batches bring its top k.
      compute: how a step is computed.
      optimizer: any of optax, complete with its rate, in place of AdamW: rates, decay, clipping and schedule of the arm
        then mean nothing. It sees the tree that trains, {"weights": ..., "scales": ...} or {"adapters": ...}.

    Raises:
      UserError: a loss without what it compares with, or what `Plan.assign` raises.
    """
    through = through or Quantized(tuple(quantizers_of(arm.grid, config).items()))
    teacher, compute = teacher or Teacher(), compute or Compute()
    if isinstance(through, Adapted):
        groups: tuple[Group, ...] = (arm.optimizer.group("adapters", "adapters/*"),)
    else:
        groups = groups_of(arm.optimizer, through.quantizers, steps)
    schedule = arm.optimizer.schedule(steps)
    moved_by = partitioned(groups, schedule) if optimizer is None else restrained(optimizer, groups)
    step = make_step(
        _objective(arm, config, through, teacher, compute.mixed), moved_by, seed=compute.seed,
        accumulate=compute.accumulate, ema=arm.optimizer.ema or None, labels=partial(labels, groups=groups),
    )  # fmt: skip
    rates_at: Any = partial(rates, groups, schedule) if optimizer is None else lambda step: {}
    facts = {"arm": dataclasses.asdict(arm), "steps": steps, "confidence": teacher.confidence}
    return Program(arm, config, steps, through, rates_at, moved_by, step, facts | dataclasses.asdict(compute))


def _objective(arm: Arm, config: DecoderConfig, through: Parametrization, teacher: Teacher, mixed: bool) -> Objective:
    """The loss of an arm's state on a batch."""
    losses, chunk = arm.losses, arm.losses.vocab_chunk
    if "cakld" in losses.names and teacher.confidence is None:
        raise UserError(f"arm {arm.name!r}: cakld needs the teacher's confidence (`teacher_confidence`)")
    if chunk and isinstance(through, Adapted):
        raise UserError(f"arm {arm.name!r}: vocab_chunk is for quantized weights; adapters want all logits")

    def read(forward: Forward) -> Apply | Readout:
        return Readout(forward.config, forward, chunk) if chunk else forward

    student, tutor, hidden = Forward(config, arm.activations, mixed, not chunk), None, None
    if teacher.config is not None and losses.taught:
        tutor = Forward(teacher.config, mixed=mixed, readout=not chunk)
        if "hidden" in losses.names:
            _check_alike(teacher.config, config)
            hidden = tutor.hidden, through.forward(student.hidden)
    return language_loss(
        through.forward(read(student)), losses, float_weights if arm.optimizer.prox else through,
        teacher=None if tutor is None else read(tutor), hidden=hidden, confidence=teacher.confidence,
    )  # fmt: skip


def _check_alike(teacher: DecoderConfig, student: DecoderConfig) -> None:
    if (teacher.layers, teacher.dim) != (student.layers, student.dim):
        raise UserError(
            f"the term hidden compares block by block: the teacher has {teacher.layers} blocks of {teacher.dim}, the "
            f"student {student.layers} of {student.dim}"
        )


def start_state(
    program: Program,
    params: Any,
    *,
    rounded: Any = None,
    teacher: Any = None,
    importance: Mapping[str, Array] | None = None,
) -> TrainState:
    """Where quantized weights start to train.

    Args:
      params: the float weights.
      rounded: a recipe's result for the same weights, a tree with QTensors: its grids, codes and dense leaves are
        the start.
      teacher: the weights of a teacher that runs in the same step.
      importance: {path: f32[in]}, the mean squared input of each channel, for frozen scales: at the start and at every
        refresh; and for the start of learned ones.

    Raises:
      UserError: a recipe's result under scales that are refit at every step, or with a weight packed that stays float;
        none where the arm starts from one.
    """
    arm, quantizers = program.arm, program.through.quantizers
    if arm.grid.init and rounded is None:
        raise UserError(f"arm {arm.name!r}: init is {arm.grid.init!r}, but no recipe's result was given to start from")
    masters = params if rounded is None else weights.started(params, rounded, quantizers)
    trained, scales = weights.init(params if rounded is None else rounded, quantizers, importance)
    constants: dict[str, Any] = {"scales": scales}
    if teacher is not None and arm.losses.taught:
        constants["teacher"] = teacher
    tree: dict[str, Any] = {"scales": trained} if trained else {}
    (tree if "weights" in arm.optimizer.trains else constants)["weights"] = masters
    return init_state(tree, program.optimizer, constants, ema=arm.optimizer.ema > 0)


@partial(jax.jit, static_argnums=1)
def trained_on(state: TrainState, program: Program) -> Any:
    """What the forward runs on, of the parameters that are exported."""
    return program.through(program.exported(state), state.constants)


@partial(jax.jit, static_argnums=1)
def statistics(state: TrainState, program: Program) -> tuple[dict[str, Array], Any]:
    """`weights.statistics` of a state; under a proximal map also how far the model's weights are from their grid."""
    params = latent(state.optimizer, state.params) if program.arm.optimizer.prox else state.params
    parts = params.get("scales", {}), state.constants.get("scales", {})
    numbers, codes = weights.statistics(float_weights(params, state.constants), program.through.quantizers, *parts)
    if program.arm.optimizer.prox:
        grid, now = (weights.leaves_by_path(w) for w in (trained_on(state, program), state.params["weights"]))
        off = sum(jnp.sum(jnp.square(now[p] - grid[p])) for p in program.through.quantizers)
        numbers["off_grid"] = jnp.sqrt(off / sum(jnp.sum(jnp.square(now[p])) for p in program.through.quantizers))
    return numbers, codes


def refresh(state: TrainState, program: Program) -> TrainState:
    """The state with frozen scales fitted anew."""
    return dataclasses.replace(state, constants=_refreshed(state.params, state.constants, program))


@partial(jax.jit, static_argnums=2)
def _refreshed(params: Any, constants: Any, program: Program) -> Any:
    scales = weights.refit(float_weights(params, constants), program.through.quantizers, constants["scales"])
    return constants | {"scales": scales}
