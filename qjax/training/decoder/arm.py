"""One way to train a model through its quantization, as a config writes it; experiments compare arms.

    arm = Arm("q2", Grid("int2_g64_mid_mse", scales="learned"), Optimizer(5e-4), Losses("0.5*ce + 0.5*fkl"))

    [arm]                                    the same in a config
    name = "q2"
    grid = { format = "int2_g64_mid_mse", scales = "learned" }
    optimizer = { rate = 5e-4 }
    losses = { terms = "0.5*ce + 0.5*fkl" }

`program` compiles it, `finetune` runs it.
"""

from __future__ import annotations

import dataclasses

from qjax.errors import UserError
from qjax.training.decoder.quantization import Activations, Grid
from qjax.training.losses.objectives import Losses
from qjax.training.optim.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
      name: what the tables call it.
      grid: that of the weights.
      optimizer: how parameters move.
      losses: what is minimized.
      activations: how what flows is rounded.
    """

    name: str
    grid: Grid = dataclasses.field(default_factory=Grid)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    losses: Losses = dataclasses.field(default_factory=Losses)
    activations: Activations = dataclasses.field(default_factory=Activations)

    def __post_init__(self) -> None:
        """What its parts can only be wrong in together."""
        grid, optimizer = self.grid, self.optimizer
        if optimizer.prox:
            if not grid.format:
                raise UserError(f"arm {self.name!r}: prox pulls weights to a format; name one")
            if (grid.scales, grid.rule, grid.estimator) != ("refit", "own", ""):
                raise UserError(
                    f"arm {self.name!r}: prox goes with refit scales of the format's own rule, without an estimator"
                )
        own_scales = bool(grid.format) and grid.scales in ("learned", "decoupled")
        if "weights" not in optimizer.trains and not ("scales" in optimizer.trains and own_scales):
            raise UserError(
                f"arm {self.name!r}: nothing trains; `trains` is {optimizer.trains} and the scales are {grid.scales}"
            )
