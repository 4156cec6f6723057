"""What an arm compiles: its quantizers, its optimizer and its jitted step, and where its state starts.

    forward        a decoder's logits, or what its head reads
    hidden_states  what leaves each of its blocks, in the same arithmetic
    program        quantizers, groups, schedule, step: cached, so that no second run compiles again
    start_state    the float weights, or any recipe's result for them
    packed         the tree that is exported

`finetune` runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Block, Decoder
from qjax.tensor import is_qtensor
from qjax.training.decoder.arm import Arm
from qjax.training.decoder.precision import mixed_dot_general
from qjax.training.decoder.quantization import Activations, quantizers_of
from qjax.training.grid import weights
from qjax.training.grid.activations import quantized_cache, quantized_inputs
from qjax.training.losses.objectives import Apply, Hidden, Readout, language_loss, parse_terms, student
from qjax.training.optim.groups import Group, labels, partitioned
from qjax.training.optim.optimizer import groups_of
from qjax.training.optim.parq import latent
from qjax.training.run.state import TrainState, init_state, make_step
from qjax.typing import Array


@lru_cache(maxsize=64)
def forward(
    config: DecoderConfig, activations: Activations | None = None, mixed: bool = False, readout: bool = True
) -> Apply:
    """A decoder's forward for training: equal arguments give the same function.

    Args:
      activations: how what flows is rounded; None: not at all.
      mixed: bfloat16 operands and float32 sums; else float32.
      readout: give logits; else what the head reads.
    """
    model = _decoder(config, activations, mixed, readout)

    def apply(params: Any, tokens: Array) -> Array:
        return model.apply({"params": params}, tokens)  # type: ignore[return-value]

    return _reading(apply, activations)


@lru_cache(maxsize=64)
def hidden_states(config: DecoderConfig, activations: Activations | None = None, mixed: bool = False) -> Hidden:
    """What leaves each block in `forward` of the same arguments, [b, t, dim] each."""
    model = _decoder(config, activations, mixed, readout=False)

    def states(params: Any, tokens: Array) -> list[Array]:
        blocks = {"capture_intermediates": lambda module, _: isinstance(module, Block), "mutable": "intermediates"}
        seen: Any = model.apply({"params": params}, tokens, **blocks)[1]["intermediates"]  # type: ignore[arg-type]
        return [seen[f"layers_{i}"]["__call__"][0][0] for i in range(config.layers)]  # of (x, its cache)

    return _reading(states, activations)


def _decoder(config: DecoderConfig, activations: Activations | None, mixed: bool, readout: bool) -> Decoder:
    options: dict[str, Any] = {"dtype": jnp.bfloat16, "dot_general": mixed_dot_general} if mixed else {}
    if activations and activations.cache:
        options["stored"] = quantized_cache(activations.cache)
    return Decoder(config, readout=readout, **options)


def _reading(apply: Any, activations: Activations | None) -> Any:
    """The same function with the inputs of its blocks rounded."""
    rounded = activations and activations.inputs
    return quantized_inputs(apply, rounded, ("layers_*",)) if rounded else apply  # type: ignore[arg-type]


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
      steps: the length of the run, for its schedules.
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
    quantizers, terms, chunk = quantizers_of(arm.grid, config), parse_terms(arm.losses.terms), arm.losses.vocab_chunk
    groups = groups_of(arm.optimizer, arm.grid.scales, quantizers, steps)
    schedule = arm.optimizer.schedule(steps)
    optimizer = partitioned(groups, schedule)

    def read(config: DecoderConfig, activations: Activations | None = None) -> Readout | Apply:
        apply = forward(config, activations, mixed, not chunk)
        return Readout(config, apply, chunk) if chunk else apply

    loss = language_loss(
        read(config, arm.activations), terms, {} if arm.optimizer.prox else quantizers,
        teacher=None if teacher is None else read(teacher),
        hidden=_hidden(arm, config, teacher, mixed) if any(t.name == "hidden" for t in terms) else None,
        confidence=confidence, temperature=arm.losses.temperature,
    )  # fmt: skip
    step = make_step(
        loss,
        optimizer,
        seed=seed,
        accumulate=accumulate,
        ema=arm.optimizer.ema or None,
        labels=lambda p: labels(p, groups),
    )
    return Program(arm, quantizers, groups, schedule, optimizer, step)


def _hidden(arm: Arm, config: DecoderConfig, teacher: DecoderConfig | None, mixed: bool) -> Any:
    if teacher is None:
        return None
    if (teacher.layers, teacher.dim) != (config.layers, config.dim):
        raise UserError(
            f"the term hidden compares block by block: the teacher has {teacher.layers} blocks of {teacher.dim}, the "
            f"student {config.layers} of {config.dim}"
        )
    return hidden_states(teacher, mixed=mixed), hidden_states(config, arm.activations, mixed)


def start_state(
    made: Program,
    params: Any,
    *,
    rounded: Any = None,
    teacher: Any = None,
    importance: Mapping[str, Array] | None = None,
) -> TrainState:
    """Where an arm starts.

    Args:
      params: the float weights.
      rounded: a recipe's result for the same weights, a tree with QTensors: its grids, codes and dense leaves are
        the start.
      teacher: the weights of a teacher that runs in the same step.
      importance: see `weights.init`.

    Raises:
      UserError: a recipe's result under scales that are refit at every step, or with a weight packed that stays float.
    """
    arm, quantizers = made.arm, made.quantizers
    if rounded is not None:
        for path, leaf in weights.leaves_by_path(rounded).items():
            if is_qtensor(leaf) and path not in quantizers:
                raise UserError(
                    f"{path}: the start has it in {leaf.format.name}, and arm {arm.name!r} trains it in float; round "
                    "the start by the arm's own plan (`arm.grid.plan(config)`), or give the arm a format for it"
                )
    trained, kept_scales = weights.init(params if rounded is None else rounded, quantizers, importance)
    if rounded is not None:
        if arm.grid.scales == "refit":
            raise UserError(
                f"arm {arm.name!r}: refit scales would not keep a recipe's grid; take frozen or learned ones"
            )
        params = weights.started(params, rounded, quantizers)
    kept: dict[str, Any] = {"scales": kept_scales} | ({} if teacher is None else {"teacher": teacher})
    tree: dict[str, Any] = {"scales": trained} if trained else {}
    (tree if "weights" in arm.optimizer.trains else kept)["weights"] = params
    return init_state(tree, made.optimizer, kept, ema=arm.optimizer.ema > 0)


def stored(state: TrainState, made: Program) -> Any:
    """The parameters that are exported: the average, the latent weights of a proximal map, or those of the state."""
    if made.arm.optimizer.prox:
        return latent(state.optimizer, state.params)
    return state.params if state.ema is None else state.ema


def packed(state: TrainState, made: Program) -> Any:
    """The tree that is exported: `stored`, quantized."""
    params = stored(state, made)
    if not made.quantizers:
        return params.get("weights", state.kept.get("weights"))
    return _packed(params, state.kept, made)


@partial(jax.jit, static_argnums=2)
def _packed(params: Any, kept: Any, made: Program) -> Any:
    return weights.packed_params(_weights(params, kept), made.quantizers, *_scales(params, kept))


@partial(jax.jit, static_argnums=2)
def faked(params: Any, kept: Any, made: Program) -> Any:
    """The weights that training runs on, of `stored` parameters."""
    return student(params, kept, made.quantizers)


@partial(jax.jit, static_argnums=1)
def measured(state: TrainState, made: Program) -> tuple[dict[str, Array], Any]:
    """`weights.measured` of a state; under a proximal map also how far the model's weights are from their grid."""
    params = latent(state.optimizer, state.params) if made.arm.optimizer.prox else state.params
    numbers, codes = weights.measured(_weights(params, state.kept), made.quantizers, *_scales(params, state.kept))
    if made.arm.optimizer.prox:
        grid, now = (weights.leaves_by_path(w) for w in (faked(params, state.kept, made), state.params["weights"]))
        off = sum(jnp.sum(jnp.square(now[p] - grid[p])) for p in made.quantizers)
        numbers["off_grid"] = jnp.sqrt(off / sum(jnp.sum(jnp.square(now[p])) for p in made.quantizers))
    return numbers, codes


@partial(jax.jit, static_argnums=2)
def refreshed(params: Any, kept: Any, made: Program) -> Any:
    """`kept` with frozen scales fitted anew."""
    return kept | {"scales": weights.refreshed(_weights(params, kept), made.quantizers, kept["scales"])}


def _weights(params: Any, kept: Any) -> Any:
    return params.get("weights", kept.get("weights"))


def _scales(params: Any, kept: Any) -> tuple[Any, Any]:
    return params.get("scales", {}), kept.get("scales", {})
