"""The optimizer of a run, as a config writes it: groups of AdamW under one schedule, and a proximal map onto the grid.

rate of a group at step t  =  its peak  x  schedule(t)        warm-up, then a cosine, a constant or a cooldown
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import partial
from typing import Literal, get_args

import optax

from qjax.errors import UserError, check_word
from qjax.formats.protocol import Format
from qjax.training.grid.fake_quant import fake_quant
from qjax.training.grid.weights import Quantizers
from qjax.training.optim.groups import Group
from qjax.training.optim.parq import inverse_slope, parq, piecewise_affine, relaxed
from qjax.training.optim.schedules import warmup_constant_cooldown, warmup_cosine

Shape = Literal["cosine", "constant", "cooldown"]
Prox = Literal["", "parq", "relax"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How parameters move.

    Attributes:
      rate, scale_rate: the peak learning rates; scale_rate 0: ten times the rate.
      weight_decay, clip, warmup: of AdamW; warmup is a share of the steps.
      shape: what follows the warm-up: "cosine" to 0; "constant", where the cooldown is another run's; or "cooldown",
        constant first, and in the end to 0 as 1 - sqrt.
      cooldown: of the shape "cooldown", how long the fall is, as a share of the steps.
      ema: decay of the moving average that is exported; 0: none.
      trains: parts that train: "weights", "scales"; of learned scales with frozen weights codes may move.
      prox: "" quantizes the weights in every forward; "parq" or "relax" pulls them to the grid by a proximal map in the
        optimizer (`parq`), around latent weights, of which the export is made.
      prox_span: where in the run the pull begins and where all weights are on the grid, as shares of the steps.
    """

    rate: float = 5e-4
    scale_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    shape: Shape = "cosine"
    cooldown: float = 0.2
    ema: float = 0.0
    trains: tuple[str, ...] = ("weights", "scales")
    prox: Prox = ""
    prox_span: tuple[float, float] = (0.0, 0.9)

    def __post_init__(self) -> None:
        check_word("shape", self.shape, get_args(Shape))
        check_word("prox", self.prox, get_args(Prox))
        for part in self.trains:
            check_word("each of trains", part, ("weights", "scales"))
        start, end = self.prox_span
        falls = self.shape != "cooldown" or 0 < self.cooldown <= 1 - self.warmup
        for fits, message in (
            (self.rate > 0, f"rate must be positive, got {self.rate}"),
            (self.clip > 0, f"clip must be positive, got {self.clip}"),
            (self.scale_rate >= 0, f"scale_rate must not be negative, got {self.scale_rate}"),
            (self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}"),
            (0 <= self.warmup < 1, f"warmup is a share of the steps, from 0 to below 1; got {self.warmup}"),
            (falls, f"cooldown is a share of the steps that fits behind the warmup, got {self.cooldown}"),
            (0 <= self.ema < 1, f"ema is a decay from 0 to below 1, got {self.ema}"),
            (0 <= start < end <= 1, f"prox_span is two rising shares of the steps, got {start} and {end}"),
            (not self.prox or "weights" in self.trains, "prox pulls weights that train; add weights to `trains`"),
            (not self.prox or not self.ema, "prox goes without ema: the latent weights are exported"),
        ):
            if not fits:
                raise UserError(message)

    def schedule(self, steps: int) -> optax.Schedule:
        """What the rates are multiplied by, from the step."""
        rise = round(self.warmup * steps)
        if self.shape == "cooldown":
            fall = min(max(1, round(self.cooldown * steps)), steps - rise)
            return warmup_constant_cooldown(1.0, steps, rise, fall)
        return warmup_cosine(1.0, steps, rise, floor=1.0 if self.shape == "constant" else 0.0)

    def group(self, name: str, pattern: str, **options: object) -> Group:
        """Parameters at the rate and the decay of weights."""
        return Group(name, pattern, self.rate, self.weight_decay, self.clip, **options)  # type: ignore[arg-type]


def groups_of(optimizer: Optimizer, quantizers: Quantizers, steps: int) -> tuple[Group, ...]:
    """Which parameters train and how: scales, weights, and of `prox` one group for each format."""
    groups: list[Group] = []
    if any(q.trains for q in quantizers.values()):
        decoupled = any(q.scales == "decoupled" for q in quantizers.values())
        if decoupled and "weights" not in optimizer.trains:  # codes stay: what decides them does not move
            groups.append(Group("codes", "re:scales/.*/(threshold|offset)", frozen=True))
        rate, frozen = optimizer.scale_rate or 10 * optimizer.rate, "scales" not in optimizer.trains
        groups.append(Group("scales", "scales/*", rate, 0.0, optimizer.clip, frozen))
    if "weights" in optimizer.trains:
        groups += _proximal(optimizer, quantizers, steps) if optimizer.prox else []
        groups.append(optimizer.group("weights", "weights/*"))
    return tuple(groups)


def _proximal(optimizer: Optimizer, quantizers: Quantizers, steps: int) -> Iterator[Group]:
    """The groups of quantized weights under `prox`; rho is 0 in the last step at the latest, which ends on the grid."""
    start, end = (round(share * steps) for share in optimizer.prox_span)
    end = min(end, steps - 1)
    rho = inverse_slope(min(start, end - 1), end)
    by_kind: dict[tuple[Format, int], list[str]] = {}
    for path, q in quantizers.items():
        by_kind.setdefault((q.format, q.axis), []).append(re.escape(path))
    for (fmt, axis), paths in by_kind.items():
        nearest = partial(fake_quant, format=fmt, axis=axis)
        prox = piecewise_affine(fmt, axis) if optimizer.prox == "parq" else relaxed(nearest)
        pattern = f"re:weights/({'|'.join(paths)})"
        yield optimizer.group(f"{fmt.name} along {axis}", pattern, wrap=partial(parq, prox=prox, rho=rho))
