"""Learned rotations of the residual stream and of each layer's values, folded into the weights: SpinQuant.

    L(R_1, R_2) = KL(p_float || p of Q(R W), Q(R x))        R_1 [dim, dim],  R_2 [head_dim, head_dim] of each layer
    R <- Cayley step of dL/dR, straight through the rounding Q (optim/cayley.py)

It starts at random Hadamard matrices, QuaRot's, which are folded first: what is learned is R = I from there on. The
model's own output does not depend on R, only what rounding makes of it does. `learn_rotations` gives a float model,
which any recipe rounds; `spinquant` rounds it with error feedback, as the paper does. A rotation is of the whole model:
so this is no recipe, which sees one weight, and its file has no trace of it.

Source: SpinQuant, Liu et al., arXiv:2405.16406, sections 3.1 to 3.3: 100 steps of length 1.5 falling to 0, on the
network of rounded inputs, then GPTQ. Its loss is that of labels; the KL to the float model has less noise in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from qjax.chain import Chain
from qjax.errors import UserError
from qjax.formats import Format
from qjax.models.config import DecoderConfig
from qjax.models.fuse import rotate_residual, rotate_values, rotated
from qjax.models.model import Model
from qjax.models.turned import turned_residual, turned_values
from qjax.pipeline import Calibration, Report, quantize_model
from qjax.plan import Plan
from qjax.plan.named import as_plan
from qjax.recipes import Recipe
from qjax.reparam.orthogonal import turned
from qjax.training.decoder.quantization import Activations
from qjax.training.grid.weights import Quantizers, fake_params, quantizers_of
from qjax.training.losses.objectives import Losses, language_loss
from qjax.training.optim.cayley import cayley_sgd
from qjax.training.tuning.descent import Descent, Tuning, descend, mean_over
from qjax.training.tuning.end_to_end import check_windows, kl_of, readout
from qjax.typing import Array

Inputs = Literal["", "int8", "int4", "e4m3", "e5m2"]


def learn_rotations(
    model: Model,
    plan: str | Format | Plan | None,
    calibration: Calibration,
    tuning: Tuning | None = None,
    *,
    inputs: Inputs = "",
    seed: int = 0,
    values: bool = True,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Model, Descent]:
    """The same model in coordinates in which rounding loses least.

    Args:
      model: float weights.
      plan: how weights are rounded while rotations learn, to nearest; None: not at all.
      calibration: windows to learn on; those held out decide which step is kept, and there must be one.
      tuning: how long; its `rate` is the longest Cayley step, and falls to 0. None: the paper's, 100 steps of 1.5; say
        `rate=1.5` in one of your own, for the default of `Tuning` is Adam's.
      inputs: how the inputs of the blocks' weights are rounded.
      seed: of the Hadamard matrices at the start.
      values: learn R_2 too.
      progress: called as (step, the last KL looked at, held out).

    Returns: a float model with the same logits, its head untied; and how it was found, held-out KL of nearest rounding.

    Raises:
      UserError: nothing that rounds; no window held out; what `rotated`, `Plan.assign` and `descend` raise.
    """
    if plan is None and not inputs:
        raise UserError("rotations are learned for a rounding: give a plan for weights, a kind for inputs, or both")
    check_windows(model.config, calibration)
    tuning = tuning or Tuning(rate=1.5)
    base = rotated(model, seed, values, untie=True)
    config, tokens = base.config, np.asarray(calibration.tokens, np.int32)
    used, held = tokens[: calibration.used], tokens[calibration.used :]
    quantizers = {} if plan is None else quantizers_of(base.params, as_plan(plan, config))
    rounded = RoundedTurned(config, tuple(quantizers.items()))
    teacher, student = readout(config), readout(config, Activations(inputs))
    constants = {"teacher": base.params}
    start = {"residual": jnp.eye(config.dim)}
    if values:
        start["values"] = jnp.tile(jnp.eye(config.head_dim)[None], (config.layers, 1, 1))

    def judge(matrices: Any) -> float:
        dense = _rounded(rounded, matrices, constants)
        return mean_over(len(held), tuning.batch, lambda at: kl_of(teacher, student, base.params, dense, held[at, :-1]))

    best, found = descend(
        language_loss(student, Losses("fkl"), rounded, teacher=teacher), tuning, start, constants,
        lambda rows: {"tokens": used[rows]}, len(used), judge, "the rotated model", progress, _cayley,
    )  # fmt: skip
    R = jax.tree.map(nearest_orthogonal, best)
    params, _ = rotate_residual(base.params, config, partial(turned, Q=R["residual"]))
    if values:
        params = rotate_values(params, config, [partial(turned, Q=Q) for Q in R["values"]])
    return dataclasses.replace(base, params=params), found


def spinquant(
    model: Model,
    plan: str | Format | Plan,
    calibration: Calibration,
    tuning: Tuning | None = None,
    *,
    recipe: str | Recipe | Chain = "gptq",
    **options: Any,
) -> tuple[Model, Report]:
    """Rotations learned for a plan, then rounded onto it with error feedback.

    Args:
      model, plan, calibration, tuning: as for `learn_rotations`.
      recipe: how the rotated weights are rounded.
      options: of `learn_rotations`.

    Returns: the quantized model, and a report of every weight; `tuned` in it is the descent's.
    """
    turned_model, found = learn_rotations(model, plan, calibration, tuning, **options)
    quantized, report = quantize_model(turned_model, plan, recipe, calibration)
    return quantized, dataclasses.replace(report, tuned={"said": f"rotations, {found}", **found.to_json()})


@dataclasses.dataclass(frozen=True)
class RoundedTurned:
    """(matrices, constants) -> the weights of constants["teacher"], turned and rounded, with gradients by the matrices.

    Attributes:
      config: of the decoder.
      items: (path, quantizer) of the weights that are rounded.
    """

    config: DecoderConfig
    items: tuple[tuple[str, Any], ...]

    def __call__(self, matrices: dict[str, Array], constants: Any) -> Any:
        flat = flatten_dict(constants["teacher"], sep="/")
        flat = turned_residual(flat, self.config, partial(turned, Q=matrices["residual"]))
        if "values" in matrices:
            flat = turned_values(flat, self.config, [partial(turned, Q=Q) for Q in matrices["values"]])
        quantizers: Quantizers = dict(self.items)
        return fake_params(unflatten_dict(flat, sep="/"), quantizers, {}, {})


@partial(jax.jit, static_argnums=0)
def _rounded(rounded: RoundedTurned, matrices: Any, constants: Any) -> Any:
    return rounded(matrices, constants)


def _cayley(tuning: Tuning, kinds: tuple[str, ...]) -> optax.GradientTransformation:
    del kinds
    return cayley_sgd(optax.linear_schedule(tuning.rate, 0.0, tuning.steps))


def nearest_orthogonal(X: Any) -> Array:
    """The orthogonal matrices nearest to some: U V^T of U S V^T, in float64; f32[*b, n, n]."""
    U, _, Vt = np.linalg.svd(np.asarray(X, np.float64))
    return jnp.asarray(U @ Vt, jnp.float32)
