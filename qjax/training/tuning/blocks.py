"""A block tuned on its own output, as a stage of the walk: behind its rounding, or while it is rounded.

    L = |block(z; values(v)) - y|^2 / Var y        z behind what is rounded and tuned already, y of the float model

    quantize_model(model, "Q2_K", "best_gguf", calibration, tune=TuneBlocks(Tuning(steps=50)))

Numbers that lie beside the codes move (continuous.py); vectors stay, for files have theirs before the walk begins. The
windows that the walk holds out decide which step is kept. With `within` it is QuIP#'s order: behind q, k and v, behind
o, behind gate and up, the block's weights that are still floats move too, to make up for what is rounded, and are
rounded as they are then. The cross term of a recipe (`ldlq(cross=1)`) makes up for the same, and goes without `within`.

Source: QuIP# (arXiv:2402.04396, section 5) and AQLM (arXiv:2401.06118, section 3.3). `training.decoder.blockwise`
trains codes too.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.models.model import dense_params
from qjax.models.stages import Apply
from qjax.pipeline.tuned import get
from qjax.training.losses.distill import relative_mse
from qjax.training.tuning.continuous import Parameters, start, stored, values
from qjax.training.tuning.descent import Tuning, descend, mean_over
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class BlockOutput:
    """How far a block's output is from the float block's: an `Objective` of {"x", "y"} f32[b, t, dim]."""

    apply: Apply

    def __call__(
        self, trained: Parameters, constants: Any, batch: dict[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        del key
        return relative_mse(batch["y"], self.apply(values(constants, trained), batch["x"])), {}


@dataclasses.dataclass(frozen=True)
class TuneBlocks:
    """A stage for `walk`: see `qjax.pipeline.tuned.Tuner`, and the module's docstring.

    Attributes:
      tuning: of each block.
      within: also behind each of its inputs, with the weights that are still to be rounded.
    """

    tuning: Tuning = dataclasses.field(default_factory=lambda: Tuning(steps=50))
    within: bool = False

    def __call__(
        self, name: str, apply: Apply, packed: Any, x: np.ndarray, y: np.ndarray, used: int, rest: tuple[str, ...] = ()
    ) -> tuple[Any, str]:
        """The block of the same codes, `rest` of it moved as well, and what to say of it.

        Raises:
          UserError: a weight that rounds its inputs; a loss that is no number before anything moved.
        """
        try:
            trained = start(packed)
        except UserError as e:
            raise UserError(f"{name}/{e}") from None
        trained.pop("vectors", None)
        if rest:
            trained["weights"] = {path: jnp.zeros(get(packed, path).shape, jnp.float32) for path in rest}
        if not trained:
            return packed, f"{name}: nothing to tune, its formats have no scales"
        objective, held = BlockOutput(apply), slice(used if used < len(x) else 0, len(x))
        z, target = x[held], y[held]

        def judge(trained: Parameters) -> float:
            dense = dense_params(stored(packed, trained))
            return mean_over(
                len(z), self.tuning.batch, lambda at: _distance(apply, dense, np.asarray(z[at]), np.asarray(target[at]))
            )

        best, found = descend(
            objective, self.tuning, trained, packed, lambda rows: {"x": np.asarray(x[rows]), "y": np.asarray(y[rows])},
            used, judge, name,
        )  # fmt: skip
        unseen = "" if used < len(x) else " (no window was held out: of those that trained)"
        what = f"{name} tuned on its output" + (f" with {len(rest)} weights still to be rounded" if rest else "")
        return stored(packed, best), f"{what}, {found}{unseen}"


@partial(jax.jit, static_argnums=0)
@full_float32
def _distance(apply: Apply, dense: Any, x: Array, y: Array) -> Array:
    return relative_mse(y, apply(dense, x))
