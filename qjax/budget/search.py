"""The plan of a budget: what each group costs, the cheapest choice, measured as a whole, mended, and beaten by none.

    cost(g, f)  ->  plan = argmin sum_g cost(g, f_g), bytes <= budget  ->  KL(plan)  ->  rivals of no more bytes

A sum of parts is no promise: errors of different weights meet. So the plan is run as a whole; then each part of it is
put back to floats, one at a time, and the costs in that part are scaled by what this gained over what its groups had
promised; with these costs another choice is made, and whichever measures less on other windows is kept. Last, the same
measure is taken of the uniform plans and of llama-quantize's mixes that are no larger: where one of them is better, it
is what is returned, and `name` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from qjax.budget.allocate import allocate, too_small
from qjax.budget.forward import Params, Runs
from qjax.budget.groups import Group, stored_size
from qjax.budget.rounding import Rounder
from qjax.budget.sensitivity import Choice, Progress, Sensitivity, sensitivities
from qjax.errors import UserError
from qjax.evaluate.perplexity import mean_and_errors
from qjax.formats import Format
from qjax.plan import KEEP, Plan, Rule

RIVALS = 3
"""Plans of no more bytes that are measured: the largest."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan that was run as a whole.

    Attributes:
      name: "budget", "budget, mended", or the uniform format's or mix's.
      formats: {path: format} of all weights that groups are made of.
      nbytes: of those.
      predicted: the sum of its groups' costs, nats; None where it has formats that were not tried.
      kl, kl_se: measured on the windows that nothing was chosen by, nats, with its standard error.
    """

    name: str
    formats: Mapping[str, Format]
    nbytes: int
    predicted: float | None
    kl: float
    kl_se: float


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
      best: the candidate of least KL.
      candidates: all that were run, in their order.
      sensitivities: of all groups.
      factors: {part: what its groups' costs were scaled by}; {} without mending.
      floor: KL of the float model to itself, run a second time in other batches, nats.
      rounder: to run other plans.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    sensitivities: tuple[Sensitivity, ...]
    factors: Mapping[str, float]
    floor: float
    rounder: Rounder

    def plan(self, kept: Sequence[str] = ()) -> Plan:
        """The best as an ordinary plan; weights of the paths `kept` stay as they are."""
        rules = [Rule(path, fmt.name) for path, fmt in self.best.formats.items()]
        return Plan((*rules, *(Rule(path, KEEP) for path in kept)), self.best.name)


def search(
    rounder: Rounder,
    check: Runs,
    groups: Sequence[Group],
    budget: int,
    rivals: Mapping[str, Mapping[str, Format]],
    *,
    measured: int = 2,
    mend: bool = True,
    progress: Progress = lambda *_: None,
) -> Found:
    """The plan of least measured KL whose groups take no more than `budget` bytes.

    Args:
      rounder: of the float model, on the windows that sensitivities are measured on.
      check: the float model on other windows, with its baseline.
      groups: of the weights.
      budget: bytes of all groups.
      rivals: {name: {path: format}}; those that are no larger than the budget are measured beside it.
      measured: formats of a group that are run.
      mend: whether to put parts back, one at a time, and choose again.
      progress: called as (what, runs done, of all).

    Raises:
      UserError: the smallest formats are larger than the budget.
    """
    least = sum(min(stored_size(f, w.shape) for f in g.formats) for g in groups for w in g.weights)
    if least > budget:
        raise too_small(least, budget)
    found = sensitivities(rounder, groups, measured, progress)
    floor = float(np.abs(_other_batches(rounder.runs)).mean())
    costs = {s.group.name: np.maximum([c.cost for c in s.choices], floor) for s in found}
    first = _chosen(found, costs, budget)
    made = [_candidate("budget", found, first, rounder, check)]
    factors: dict[str, float] = {}
    if mend:
        factors = _factors(found, first, rounder, progress)
        scaled = {s.group.name: costs[s.group.name] * factors[s.group.part] for s in found}
        second = _chosen(found, scaled, budget)
        if second != first:
            made.append(_candidate("budget, mended", found, second, rounder, check))
    sizes = {name: _size(formats, groups) for name, formats in rivals.items()}
    fit = sorted((name for name in rivals if sizes[name] <= budget), key=lambda name: -sizes[name])[:RIVALS]
    for name in fit:
        progress(name, 0, 1)
        predicted = _predicted(found, rivals[name])
        made.append(_measured(name, rivals[name], sizes[name], predicted, rounder, check))
    return Found(min(made, key=lambda c: c.kl), tuple(made), found, factors, floor, rounder)


def _chosen(found: Sequence[Sensitivity], costs: Mapping[str, np.ndarray], budget: int) -> list[Choice]:
    """One choice of each group."""
    sizes = [np.array([c.nbytes for c in s.choices]) for s in found]
    picks = allocate([costs[s.group.name] for s in found], sizes, budget)
    return [s.choices[k] for s, k in zip(found, picks, strict=True)]


def formats_of(found: Sequence[Sensitivity], chosen: Sequence[Choice]) -> dict[str, Format]:
    """{path: format} of a choice for each group."""
    return {w.path: c.format for s, c in zip(found, chosen, strict=True) for w in s.group.weights}


def _candidate(
    name: str, found: Sequence[Sensitivity], chosen: Sequence[Choice], rounder: Rounder, check: Runs
) -> Candidate:
    formats, nbytes = formats_of(found, chosen), sum(c.nbytes for c in chosen)
    return _measured(name, formats, nbytes, sum(c.cost for c in chosen), rounder, check)


def _measured(
    name: str, formats: Mapping[str, Format], nbytes: int, predicted: float | None, rounder: Rounder, check: Runs
) -> Candidate:
    kl, se, _ = mean_and_errors(rounder.kl(formats, check)[:, None])
    return Candidate(name, formats, nbytes, predicted, kl, se)


def _factors(
    found: Sequence[Sensitivity], chosen: Sequence[Choice], rounder: Rounder, progress: Progress
) -> dict[str, float]:
    """{part: (KL of the plan - KL with the part in floats) / the sum of its groups' costs}, at least a tenth."""
    runs, floats = rounder.runs, rounder.runs.params
    params: Params = rounder.params(formats_of(found, chosen))
    stages, x = runs.blocks.stages, runs.first(params)
    whole = float(runs.kl_behind(0, params, x).mean())
    promised: dict[str, float] = {}
    for s, c in zip(found, chosen, strict=True):
        promised[s.group.part] = promised.get(s.group.part, 0.0) + c.cost
    factors = {}
    for at, part in enumerate(["embed", *stages.names, *([] if stages.tied else ["head"])]):
        if part in promised:
            back = {**params, part: floats[part]}
            kl = float(runs.kl_behind(max(0, at - 1), back, runs.first(back) if part == "embed" else x).mean())
            factors[part] = max((whole - kl) / promised[part], 0.1) if promised[part] > 0 else 1.0
        progress(f"{part} put back", at, len(stages.names) + 1)
        if part in stages.names:
            x = runs.block(at - 1, params, x)
    return factors


def _other_batches(runs: Runs) -> np.ndarray:
    """KL of the float model to itself where windows pass one by one."""
    alone = dataclasses.replace(runs, step=1)
    return runs.kl(runs.params, alone.rest(0, runs.params, alone.first(runs.params)))


def _size(formats: Mapping[str, Format], groups: Sequence[Group]) -> int:
    """Bytes of the groups' weights in these formats."""
    weights = [w for g in groups for w in g.weights]
    missing = [w for w in weights if w.path not in formats]
    if missing:
        raise UserError(f"{missing[0]} has no format in the plan that is measured beside the budget's")
    return sum(stored_size(formats[w.path], w.shape) for w in weights)


def _predicted(found: Sequence[Sensitivity], formats: Mapping[str, Format]) -> float | None:
    """The sum of the groups' costs, where each has one format that was tried."""
    total = 0.0
    for s in found:
        mine = {formats[w.path] for w in s.group.weights}
        cost = next((c.cost for c in s.choices if {c.format} == mine), None)
        if cost is None:
            return None
        total += cost
    return total
