"""The state of a run and its one step, as pure functions.

    loss, g = value_and_grad(loss)(params, constants, batch, key)        key = fold_in(seed, step)
    params <- params + optimizer(g)       ema <- ema_update(ema, params)       step <- step + 1

Everything that a run needs to go on is in the state; its position in the data is the step. With `accumulate` a batch is
cut into parts of equal size, whose gradients a scan adds up: the mean over parts is the mean over the batch. It is cut
crosswise, part i of n being rows i, i + n, ...: a device holds neighbouring rows, and has its share of every part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qjax.errors import UserError
from qjax.training.losses.objectives import Objective
from qjax.training.optim.groups import ema_update, grad_norms
from qjax.typing import Array

TrainStep = Callable[["TrainState", Any], tuple["TrainState", dict[str, Array]]]


@partial(
    jax.tree_util.register_dataclass, data_fields=("step", "params", "constants", "optimizer", "ema"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree.

    Attributes:
      step: i32[], steps taken.
      params: what trains: {"weights": ..., "scales": ..., "adapters": ...}, whichever there are.
      constants: arrays that the loss reads and no gradient moves: frozen scales, packed weights.
      optimizer: optax's state.
      ema: the moving average of params, or None.
    """

    step: Any
    params: Any
    constants: Any
    optimizer: Any
    ema: Any = None


def init_state(
    params: Any, optimizer: optax.GradientTransformation, constants: Any = None, *, ema: bool = False, step: int = 0
) -> TrainState:
    """A state that starts at `params`. The arrays are copied: the caller's stay when the state is donated."""
    params, constants = jax.tree.map(jnp.copy, (params, {} if constants is None else constants))
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(step), params, constants, optimizer.init(params), average)


def make_step(
    loss: Objective,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    accumulate: int = 1,
    ema: float | None = None,
    labels: Callable[[Any], Any] | None = None,
    donate: bool = True,
) -> TrainStep:
    """The jitted step: (state, batch) -> (state, {"loss", "grad_norm/<group>", what the loss reports}).

    Args:
      loss: see `Objective`; its scalars are averaged over the parts of a batch.
      optimizer: of params.
      seed: of the run; the key of a step is fold_in(key(seed), step).
      accumulate: parts into which each batch, a tree of arrays with one leading axis, is cut.
      ema: decay of the moving average; the state must have one.
      labels: params -> a tree of group names, for the norms; None: one norm of all.
      donate: the state's buffers are reused.

    Raises:
      UserError: (when called) a batch that `accumulate` does not divide.
    """
    if accumulate < 1:
        raise UserError(f"accumulate must be at least 1, got {accumulate}")

    def gradients(params: Any, constants: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array], Any]:
        (value, report), grads = jax.value_and_grad(loss, has_aux=True)(params, constants, batch, key)
        return value, report, grads

    def accumulated(params: Any, constants: Any, batch: Any, key: Array) -> tuple[Array, dict[str, Array], Any]:
        parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
        one = jax.tree.map(lambda x: x[0], parts)
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradients, params, constants, one, key)
        )

        def add(total: Any, numbered: tuple[Array, Any]) -> tuple[Any, None]:
            number, part = numbered
            new = gradients(params, constants, part, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, new), None

        total, _ = lax.scan(add, zero, (jnp.arange(accumulate), parts))
        return jax.tree.map(lambda x: x / jnp.asarray(accumulate, x.dtype), total)

    @partial(jax.jit, donate_argnums=(0,) if donate else ())
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = gradients if accumulate == 1 else accumulated
        value, report, grads = compute(state.params, state.constants, batch, key)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema if ema is None else ema_update(state.ema, params, ema, state.step)
        norms = {"grad_norm": optax.tree.norm(grads)} if labels is None else grad_norms(grads, labels(state.params))
        norms = {name if labels is None else f"grad_norm/{name}": norm for name, norm in norms.items()}
        new = TrainState(state.step + 1, params, state.constants, optimizer_state, average)
        return new, {"loss": value, **norms, **report}

    return step


def _parts(x: Array, count: int) -> Array:
    if x.shape[0] % count:
        raise UserError(f"a batch of {x.shape[0]} rows does not divide into {count} parts; change accumulate or batch")
    return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)
