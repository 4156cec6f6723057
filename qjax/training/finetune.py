"""Quantization-aware training of a loaded model, from a plan to a model that is exported.

    program        an arm's quantizers, optimizer and jitted step
    start_state    the float weights, or any recipe's result for them
    finetune       loop.train, then the packed model, checked against what training ran on, bit for bit

A model's heldout loss is always computed from what is packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model, dense_params, running
from qjax.tensor import is_qtensor
from qjax.training import weights
from qjax.training.activations import quantized_cache, quantized_inputs
from qjax.training.arm import Arm, quantizers_of_arm
from qjax.training.estimators import place_of
from qjax.training.loop import Loop, Row, train
from qjax.training.objectives import Apply, cross_entropy, decoder_hidden, language_loss, parse_terms, student
from qjax.training.optim import Group, labels, partitioned, rates
from qjax.training.precision import mixed_dot_general
from qjax.training.processes import whole
from qjax.training.quantizer import Quantizer
from qjax.training.schedules import warmup_cosine
from qjax.training.state import TrainState, init_state, make_step
from qjax.typing import Array, Int

BatchAt = Callable[[int], Any]


@lru_cache(maxsize=64)
def forward(config: DecoderConfig, inputs: str = "", cache: str = "", mixed: bool = False) -> Apply:
    """A decoder's forward for training: equal arguments give the same function.

    Args:
      inputs, cache: see `Arm`.
      mixed: bfloat16 operands and float32 sums; else float32.
    """
    options: dict[str, Any] = {"dtype": jnp.bfloat16, "dot_general": mixed_dot_general} if mixed else {}
    if cache:
        options["stored"] = quantized_cache(cache)
    model = Decoder(config, **options)

    def apply(params: Any, tokens: Array) -> Array:
        return model.apply({"params": params}, tokens)  # type: ignore[return-value]

    return quantized_inputs(apply, inputs, ("layers_*",)) if inputs else apply  # type: ignore[arg-type]


def start_weights(w: Array, q: Any, quantizer: Quantizer) -> Array:
    """Where a recipe's result starts to train: its values, moved towards the float weights as far as their cells go.

    The codes are the recipe's (error feedback's are not the nearest), and a weight near a border stays near it.
    """
    scales, codes = q.format.unpack(q.leaves)
    x = jnp.moveaxis(jnp.asarray(w, jnp.float32), quantizer.axis, -1)
    x_hat = q.format.decode(scales, codes)
    place = place_of(q.format, scales, x, x_hat)
    reach = (0.49 * place.neighbour() * jnp.abs(place.s)).reshape(x.shape)
    return jnp.moveaxis(x_hat + jnp.clip(x - x_hat, -reach, reach), -1, quantizer.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What an arm compiles: equal arms on equal models share it, and no second run compiles again."""

    arm: Arm
    quantizers: weights.Quantizers
    groups: tuple[Group, ...]
    schedule: Any
    optimizer: Any
    step: Any


def program(
    arm: Arm,
    config: DecoderConfig,
    steps: int,
    teacher: DecoderConfig | None = None,
    confidence: float | None = None,
    accumulate: int = 1,
    mixed: bool = True,
    seed: int = 0,
) -> Program:
    """The step of an arm and what belongs to it.

    Args:
      steps: the length of the run, for its schedule.
      teacher: the architecture of a teacher that runs in the same step.
      confidence, accumulate, mixed, seed: see `finetune`.
    """
    # Behind the cache all arguments are positional: those given by name would make another entry.
    return _program(arm, config, steps, teacher, confidence, accumulate, mixed, seed)


@lru_cache(maxsize=64)
def _program(
    arm: Arm, config: DecoderConfig, steps: int, teacher: DecoderConfig | None, confidence: float | None,
    accumulate: int, mixed: bool, seed: int,
) -> Program:  # fmt: skip
    quantizers, terms = quantizers_of_arm(arm, config), parse_terms(arm.loss)
    groups: list[Group] = []
    if arm.scales in ("learned", "decoupled") and quantizers:
        if arm.scales == "decoupled" and "weights" not in arm.trains:  # codes stay: what decides them does not move
            groups.append(Group("codes", "re:scales/.*/(threshold|offset)", frozen=True))
        frozen = "scales" not in arm.trains
        groups.append(Group("scales", "scales/*", arm.scale_rate or 10 * arm.rate, 0.0, arm.clip, frozen))
    if "weights" in arm.trains:
        groups.append(Group("weights", "weights/*", arm.rate, arm.weight_decay, arm.clip))
    if all(g.frozen for g in groups):
        raise UserError(f"arm {arm.name!r}: nothing trains; `trains` is {arm.trains} and the scales are {arm.scales}")
    rise = round(arm.warmup * steps)
    constant = arm.shape == "constant"
    schedule = warmup_cosine(1.0, steps, rise, floor=1.0 if constant else 0.0)
    optimizer = partitioned(tuple(groups), schedule)
    loss = language_loss(
        forward(config, arm.inputs, arm.cache, mixed), terms, quantizers,
        teacher=None if teacher is None else forward(teacher, mixed=mixed),
        hidden=_hidden(config, teacher) if any(t.name == "hidden" for t in terms) else None, confidence=confidence,
    )  # fmt: skip
    step = make_step(
        loss, optimizer, seed=seed, accumulate=accumulate, ema=arm.ema or None, labels=lambda p: labels(p, groups)
    )
    return Program(arm, quantizers, tuple(groups), schedule, optimizer, step)


def _hidden(config: DecoderConfig, teacher: DecoderConfig | None) -> Any:
    if teacher is None:
        return None
    if (teacher.layers, teacher.dim) != (config.layers, config.dim):
        raise UserError(
            f"the term hidden compares block by block: the teacher has {teacher.layers} blocks of {teacher.dim}, the "
            f"student {config.layers} of {config.dim}"
        )
    return decoder_hidden(teacher), decoder_hidden(config)


def start_state(made: Program, params: Any, *, begun: Any = None, teacher: Any = None) -> TrainState:
    """Where an arm starts.

    Args:
      params: the float weights.
      begun: a recipe's result for the same weights, a tree with QTensors: its grids, its codes and its dense leaves are
        the start.
      teacher: the weights of a teacher that runs in the same step.

    Raises:
      UserError: a recipe's result under scales that are refit at every step.
    """
    arm, quantizers = made.arm, made.quantizers
    trained, kept_scales = weights.init(params if begun is None else begun, quantizers)
    if begun is not None:
        if arm.scales == "refit":
            raise UserError(
                f"arm {arm.name!r}: refit scales would not keep a recipe's grid; take frozen or learned ones"
            )
        stored = weights.leaves_by_path(begun)
        moved = {
            path: start_weights(leaf, stored[path], quantizers[path])
            for path, leaf in weights.leaves_by_path(params).items()
            if path in quantizers and is_qtensor(stored[path])
        }
        params = weights.replaced(begun, moved)
    kept: dict[str, Any] = {"scales": kept_scales} | ({} if teacher is None else {"teacher": teacher})
    tree: dict[str, Any] = {"scales": trained} if trained else {}
    (tree if "weights" in arm.trains else kept)["weights"] = params
    return init_state(tree, made.optimizer, kept, ema=arm.ema > 0)


def packed(state: TrainState, made: Program) -> Any:
    """The tree that is exported: the average if there is one, quantized."""
    params = state.params if state.ema is None else state.ema
    if not made.quantizers:
        return params.get("weights", state.kept.get("weights"))
    return _packed(params, state.kept, made)


@partial(jax.jit, static_argnums=2)
def _packed(params: Any, kept: Any, made: Program) -> Any:
    return weights.packed_params(_weights(params, kept), made.quantizers, *_scales(params, kept))


@partial(jax.jit, static_argnums=2)
def _faked(params: Any, kept: Any, made: Program) -> Any:
    return student(params, kept, made.quantizers)


@partial(jax.jit, static_argnums=2)
def _measured(params: Any, kept: Any, made: Program) -> Any:
    return weights.measured(_weights(params, kept), made.quantizers, *_scales(params, kept))


@partial(jax.jit, static_argnums=2)
def _refreshed(params: Any, kept: Any, made: Program) -> Any:
    return kept | {"scales": weights.refreshed(_weights(params, kept), made.quantizers, kept["scales"])}


def _weights(params: Any, kept: Any) -> Any:
    return params.get("weights", kept.get("weights"))


def _scales(params: Any, kept: Any) -> tuple[Any, Any]:
    return params.get("scales", {}), kept.get("scales", {})


def heldout_loss(apply: Apply, params: Any, windows: Int[np.ndarray, "n t"]) -> float:
    """`mean_loss` of a model; packed weights are decoded first, but for those that round their inputs."""
    return mean_loss(apply, dense_params(params), windows)


def mean_loss(apply: Apply, params: Any, windows: Int[np.ndarray, "n t"], batch: int = 16) -> float:
    """Mean negative log-likelihood of windows, nats per token, of any function of (params, tokens)."""
    parts = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    losses = [float(_mean_loss(apply, params, np.asarray(p, np.int32))) * len(p) for p in parts]
    return float(sum(losses) / len(windows))


@partial(jax.jit, static_argnums=0)
def _mean_loss(apply: Apply, params: Any, windows: Array) -> Array:
    return cross_entropy(running(apply)(params, windows[:, :-1]), windows[:, 1:])


def finetune(
    arm: Arm,
    model: Model,
    batch_at: BatchAt,
    loop: Loop,
    out: Path,
    *,
    heldout: np.ndarray,
    begun: Any = None,
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
      begun: a recipe's result for the model's weights, a tree with QTensors.
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
    needs = any(t.name != "ce" for t in parse_terms(arm.loss))
    if needs and teacher is None and "cached" not in batch_at(0):
        raise UserError(f"arm {arm.name!r}: the loss {arm.loss!r} needs a teacher, or batches with its cached top k")
    if "cakld" in arm.loss and confidence is None:
        raise UserError(f"arm {arm.name!r}: cakld needs the teacher's confidence (`teacher_confidence`)")
    if arm.init and begun is None:
        raise UserError(f"arm {arm.name!r}: init is {arm.init!r}, but no recipe's result was given to start from")
    live = teacher if needs else None
    made = program(
        arm, model.config, loop.steps, None if live is None else live.config, confidence, accumulate, mixed, seed
    )
    state = start_state(made, model.params, begun=begun, teacher=None if live is None else live.dense)
    judge = forward(model.config, arm.inputs, arm.cache)

    def evaluate(state: TrainState) -> Row:
        return {"heldout": heldout_loss(judge, packed(state, made), heldout)}

    def observe(state: TrainState, before: Any) -> tuple[Row, Any]:
        numbers, codes = _measured(state.params, state.kept, made)
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
        refresh=lambda state: dataclasses.replace(state, kept=_refreshed(state.params, state.kept, made)),
        refresh_every=arm.refresh_every if arm.scales == "frozen" else 0,
        describe=lambda at: {f"rate/{k}": float(v) for k, v in rates(made.groups, made.schedule, at).items()},
        name=arm.name, sinks=sinks,
    )  # fmt: skip
    state = whole(state)
    done = packed(state, made)
    if made.quantizers:
        weights.check_same_values(done, _faked(state.params if state.ema is None else state.ema, state.kept, made))
    return dataclasses.replace(model, params=done), rows, heldout_loss(judge, done, heldout)
