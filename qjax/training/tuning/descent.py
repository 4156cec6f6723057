"""Gradient steps on what is continuous, and which of them is kept: that with the least loss on windows held out.

    p_0 = 0,   p_{t+1} = p_t - rate Adam(dL/dp on a batch of windows)
    kept = argmin over looks t of L(stored(p_t)) on windows held out

The start is the first look: what is kept is never worse on these windows than what was rounded. Where a loss is no
number the descent ends there, with the best look before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import optax

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.training.losses.objectives import Objective
from qjax.training.optim.groups import Group, partitioned
from qjax.training.optim.schedules import warmup_cosine
from qjax.training.run.state import TrainStep, init_state, make_step
from qjax.training.tuning.continuous import Parameters
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How long and how fast.

    Attributes:
      steps: of the descent.
      batch: windows a step; fewer where there are fewer.
      rate: Adam's, of scales and other numbers, relative to each; it falls by half a cosine to 0.
      vector_rate: of vectors, relative to their root mean square.
      weight_rate: of weights that are still floats, relative to theirs.
      clip: the largest norm of either's gradient.
      looks: how often the loss on windows held out is looked at, evenly; the start not counted.
      seed: of the order of the windows.
    """

    steps: int = 100
    batch: int = 8
    rate: float = 1e-3
    vector_rate: float = 1e-3
    weight_rate: float = 1e-3
    clip: float = 1.0
    looks: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "looks"):
            if getattr(self, name) < 1:
                raise UserError(f"tuning: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "vector_rate", "weight_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"tuning: {name} must be positive, got {getattr(self, name)}")

    def is_look(self, step: int) -> bool:
        """Whether the loss is looked at behind so many steps."""
        return step * self.looks // self.steps > (step - 1) * self.looks // self.steps


OptimizerOf = Callable[[Tuning, tuple[str, ...]], optax.GradientTransformation]  # how, and the keys of what trains


@dataclasses.dataclass(frozen=True)
class Descent:
    """What became of a descent.

    Attributes:
      steps: taken.
      kept: the step behind which the parameters are; 0: the start.
      first_loss, loss: on windows held out, of the start and of what is kept.
      losses: (step, loss) of every look, the start's first.
      broken: the step at which a loss was no number, where one was.
    """

    steps: int
    kept: int
    first_loss: float
    loss: float
    losses: tuple[tuple[int, float], ...]
    broken: int | None = None

    def __str__(self) -> str:
        what = f"step {self.kept} of {self.steps} kept" if self.kept else f"none of {self.steps} steps was better"
        end = "" if self.broken is None else f"; the loss was no number at step {self.broken}, where it ended"
        return f"{what}: held out {self.first_loss:.4g} -> {self.loss:.4g}{end}"

    def to_json(self) -> dict[str, Any]:
        """For a ledger."""
        return dataclasses.asdict(self) | {"losses": [list(look) for look in self.losses]}


def descend(
    objective: Objective,
    tuning: Tuning,
    trained: Parameters,
    constants: Any,
    batch_at: Callable[[np.ndarray], Any],
    windows: int,
    judge: Callable[[Parameters], float],
    name: str,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    optimizer_of: OptimizerOf | None = None,
) -> tuple[Parameters, Descent]:
    """Tune parameters.

    Args:
      objective: (trained, constants, batch, key) -> (loss, {}); equal ones are compiled once.
      tuning: how.
      trained: where it starts.
      constants: what the objective reads beside them.
      batch_at: numbers of windows, i[batch] -> what the objective takes as a batch.
      windows: how many there are to train on.
      judge: the loss on others, of what would be stored.
      name: of what is tuned, for messages.
      progress: called as (step, the last loss that was looked at).
      optimizer_of: what makes the optimizer; None: Adam, see `Tuning`.

    Returns: the parameters of least loss, and how they were found.

    Raises:
      UserError: the loss of the start is no number.
    """
    first = judge(trained)
    if not math.isfinite(first):
        raise UserError(f"{name}: its loss is {first} before any tuning; the model or the windows are broken")
    step, optimizer = _compiled(objective, tuning, tuple(trained), optimizer_of or _adam)
    state = init_state(trained, optimizer, constants)
    order = _order(windows, tuning)
    best, looks, broken, done = (trained, 0, first), [(0, first)], None, 0
    for done in range(1, tuning.steps + 1):
        state, log = step(state, batch_at(order[done - 1]))
        finite = math.isfinite(float(log["loss"]))
        if finite and tuning.is_look(done):
            loss = judge(state.params)
            looks.append((done, loss))
            finite = math.isfinite(loss)
            best = (jax.tree.map(np.asarray, state.params), done, loss) if loss < best[2] else best
        if not finite:
            broken = done
            break
        progress(done, looks[-1][1])
    return best[0], Descent(done, best[1], first, best[2], tuple(looks), broken)


def _order(windows: int, tuning: Tuning) -> np.ndarray:
    """The windows of each step: all of them in turn, in an order drawn anew each time; i[steps, batch]."""
    rng, batch = np.random.default_rng(tuning.seed), min(tuning.batch, windows)
    rounds = -(-tuning.steps * batch // windows)
    return np.concatenate([rng.permutation(windows) for _ in range(rounds)])[: tuning.steps * batch].reshape(-1, batch)


@lru_cache(maxsize=16)
def _compiled(
    objective: Objective, tuning: Tuning, kinds: tuple[str, ...], optimizer_of: OptimizerOf
) -> tuple[TrainStep, Any]:
    """The step of equal objectives, and its optimizer."""
    optimizer = optimizer_of(tuning, kinds)
    return make_step(full_float32(objective), optimizer), optimizer


def _adam(tuning: Tuning, kinds: tuple[str, ...]) -> optax.GradientTransformation:
    each = {"scales": tuning.rate, "vectors": tuning.vector_rate, "weights": tuning.weight_rate}
    groups = [Group(kind, f"{kind}/*", each[kind], clip=tuning.clip) for kind in kinds]
    return partitioned(groups, warmup_cosine(1.0, tuning.steps, 0))


def mean_over(windows: int, batch: int, loss: Callable[[slice], Array]) -> float:
    """The mean of a loss over windows, in batches of one size, the largest up to `batch` that divides them."""
    size = next(b for b in range(min(batch, windows), 0, -1) if windows % b == 0)
    return float(np.mean([float(loss(slice(at, at + size))) for at in range(0, windows, size)]))
