"""What each format costs at each group of weights: KL to the float model with that group alone rounded.

    cost(g, f) = mean_t KL(p_t || q_t),   q the model in which the weights of g are rounded to f, all others floats

To second order KL is quadratic in the change of the logits, so that along the formats of one group it follows the
weighted squared error e(g, f) of its weights (HIGGS, arXiv:2411.17525, section 3): only a few formats of each group are
measured, spread over the errors, and between and beyond them

    cost(g, f) = cost(g, f') (e(g, f) / e(g, f'))^a        a = 1 beyond the measured ones, between them as they say
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from qjax.budget.groups import Group
from qjax.budget.rounding import Rounder, observed, placed, rounded
from qjax.formats import Format

Progress = Callable[[str, int, int], object]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A format at a group.

    Attributes:
      format: the format.
      nbytes: what the group's weights take in it.
      error: sum of h (w - w_hat)^2 over them.
      cost: KL, nats.
      measured: whether by a run; otherwise from the error.
    """

    format: Format
    nbytes: int
    error: float
    cost: float
    measured: bool


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What the formats of a group cost, by rising bytes."""

    group: Group
    choices: tuple[Choice, ...]


def sensitivities(
    rounder: Rounder, groups: Sequence[Group], measured: int = 2, progress: Progress = lambda *_: None
) -> tuple[Sensitivity, ...]:
    """The sensitivity of every group, in the order of the model.

    Args:
      rounder: of the float model; is left with its statistics.
      groups: of its weights.
      measured: formats of a group that are run: those of the largest error and, beyond one, of the least, and between.
      progress: called as (group, runs done, of all).
    """
    runs, found = rounder.runs, {}
    stages, params = runs.blocks.stages, runs.params
    x = runs.first(params)
    done, total = 0, sum(min(measured, len(g.formats)) for g in groups)
    for at, part in enumerate(["embed", *stages.names, *([] if stages.tied else ["head"])]):
        mine = [g for g in groups if g.part == part]
        stats = rounder.stats[part] = observed(runs, part, x, rounder.recipe) if mine else {}
        for group in mine:
            below = [w.path[len(part) + 1 :] for w in group.weights]
            tried = [
                (f, *rounded(part, dict.fromkeys(below, f), params[part], stats, rounder.recipe)) for f in group.formats
            ]
            errors, costs = np.array([error for *_, error in tried]), {}
            for c in spread(errors, measured):
                changed = {**params, part: placed(params[part], tried[c][1])}
                start = runs.first(changed) if part == "embed" else x
                costs[c] = float(runs.kl_behind(max(0, at - 1), changed, start).mean())
                done += 1
                progress(group.name, done, total)
            choices = [
                Choice(f, nbytes, error, float(cost), c in costs)
                for c, ((f, _, nbytes, error), cost) in enumerate(zip(tried, interpolated(errors, costs), strict=True))
            ]
            found[group.name] = Sensitivity(group, tuple(sorted(choices, key=lambda c: (c.nbytes, c.cost))))
        if part in stages.names:
            x = runs.block(at - 1, params, x)
    return tuple(found[g.name] for g in groups)


def spread(errors: np.ndarray, count: int) -> list[int]:
    """The places of `count` errors, spread evenly over their logarithms from the largest to the least.

    >>> spread(np.array([8.0, 1.0, 4.0, 2.0]), 2), spread(np.array([8.0, 1.0, 3.0, 2.0]), 3)
    ([0, 1], [0, 1, 2])
    """
    logs = np.log(np.maximum(errors, 1e-300))
    wanted = np.linspace(logs.max(), logs.min(), count) if count > 1 else [logs.max()]
    return sorted({int(np.argmin(np.abs(logs - w))) for w in wanted})


def interpolated(errors: np.ndarray, costs: dict[int, float]) -> np.ndarray:
    """The costs of all errors: those measured as they are, the others on straight lines of slope 1 beyond them, in the
    logarithms of both.

    >>> interpolated(np.array([1.0, 4.0, 16.0, 64.0]), {0: 1.0, 2: 4.0}).round(6).tolist()
    [1.0, 2.0, 4.0, 16.0]
    """
    known = sorted(costs, key=lambda c: errors[c])
    tiny = 1e-300
    e = np.log(np.maximum(errors, tiny))
    at = e[known]
    kl = np.log(np.maximum([costs[c] for c in known], tiny))
    made = np.interp(e, at, kl) + np.minimum(e - at[0], 0.0) + np.maximum(e - at[-1], 0.0)
    return np.array([costs.get(c, math.exp(v)) for c, v in enumerate(made)])
