"""Block by block: a block's weights, scales and zeros are trained so that its output is the float block's.

    x_0 = embed(tokens),   y_l = block_l(x_l),   x_{l+1} = y_l                    the float model on float inputs
    z_0 = x_0,   L_l = |block_l(z_l; fake(W, s)) - y_l|^2 / Var y_l,   z_{l+1} = block_l(z_l; trained)

`how` is the descent. "adam" is Block-AP (EfficientQAT, Chen et al., arXiv:2407.11062, section 3.2): Adam at one rate
for weights and another for what trains beside them. "sign" is AutoRound's (Cheng et al., arXiv:2309.05516, algorithm 1)
on the block's output, its paper's own loss: W = W_0 + s V moves by the sign of the gradient in steps that fall linearly
from 1 / steps levels to 0, so that |V| ends at one half at most. Blocks that do the same and have the same quantizers
run one compiled program; a block keeps its start where training did not lower its loss.

End-to-end training of the scales alone (E2E-QP, section 3.3) goes on from here: `finetune` of an arm with
scales = "decoupled", trains = ("scales",) and this result as `rounded`.
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
from jax import lax

from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.models.model import Model
from qjax.models.stages import stages_of
from qjax.rounding.ranges import per_weight
from qjax.training.grid import weights
from qjax.training.grid.qat import Quantized
from qjax.training.grid.weights import Quantizers
from qjax.training.losses.distill import relative_mse
from qjax.training.optim.schedules import warmup_cosine
from qjax.typing import Array, Float, Int

Block = Callable[[Any, Array], Array]
Pairs = tuple[Array, Array]  # inputs z and the float block's outputs y


@dataclasses.dataclass(frozen=True)
class BlockTuning:
    """How each block is trained.

    Attributes:
      steps: descent steps a block.
      batch: sequences a step.
      how: "adam" or "sign".
      rate, scale_rate: Adam's; "sign" has its own.
      seed: of the order of the sequences.
    """

    steps: int = 200
    batch: int = 4
    how: Literal["adam", "sign"] = "adam"
    rate: float = 2e-4
    scale_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.how not in ("adam", "sign"):
            raise UserError(f"block tuning: how must be adam or sign, got {self.how!r}")
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"block tuning: steps and batch must be at least 1, got {self.steps} and {self.batch}")


def tune_blocks(
    model: Model,
    quantizers: Quantizers,
    tokens: Int[np.ndarray, "n t"],
    tuning: BlockTuning | None = None,
    *,
    rounded: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train every block of a decoder on its own output.

    Args:
      model: with float weights.
      quantizers: of the weights; those outside of the blocks are rounded as they are.
      tokens: sequences.
      tuning: see `BlockTuning`.
      rounded: a recipe's result for the same weights, a tree with QTensors in the same formats.
      progress: (blocks done, blocks).

    Returns: the params with QTensors, and for each block {"block", "loss_before", "loss", "kept_start"}.

    Raises:
      UserError: fewer sequences than a batch, or what `weights.init` raises.
    """
    tuning = tuning or BlockTuning()
    if len(tokens) < tuning.batch:
        raise UserError(f"block tuning: a batch of {tuning.batch} sequences needs as many, got {len(tokens)}")
    stages = stages_of(model.config)
    x = jax.jit(stages.embed)({"embed": model.params["embed"]}, jnp.asarray(tokens, jnp.int32))
    z, out, report = x, dict(model.params), []
    for layer, (name, block) in enumerate(zip(stages.names, stages.blocks, strict=True)):
        own = {p.removeprefix(name + "/"): q for p, q in quantizers.items() if p.startswith(name + "/")}
        y = _outputs(block, model.params[name], x)
        if own:
            quantized, data = Quantized(tuple(own.items())), (z, y)
            params, constants = _start(own, model.params[name], None if rounded is None else rounded[name])
            before = float(_loss(block, quantized, params, constants, data))
            key = jax.random.fold_in(jax.random.key(tuning.seed), layer)
            new = _descend(block, quantized, tuning, params, constants, data, key)
            after = float(_loss(block, quantized, new, constants, data))
            better = after < before
            params = new if better else params
            out[name], fake = quantized.packed(params, constants), quantized(params, constants)
            losses = {"loss_before": before, "loss": after if better else before}
            report.append({"block": name, **losses, "kept_start": not better})
        else:
            fake = model.params[name]
        x, z = y, _outputs(block, fake, z)
        if progress:
            progress(layer + 1, len(stages.blocks))
    outside = {p: q for p, q in quantizers.items() if p.split("/")[0] not in stages.names}
    if outside and rounded is None:
        out = weights.packed_params(out, outside, *weights.init(out, outside))
    elif outside:
        packed = weights.leaves_by_path(rounded)
        out = weights.replaced(out, {p: packed[p] for p in outside})
    return out, report


def _start(own: Quantizers, params: Any, rounded: Any) -> tuple[Any, Any]:
    """What trains of a block and the constants beside it, as parts of a state."""
    trained, constants = weights.init(params if rounded is None else rounded, own)
    if rounded is not None:
        packed, leaves = weights.leaves_by_path(rounded), weights.leaves_by_path(params)
        params = weights.replaced(rounded, {p: weights.start_weights(leaves[p], packed[p], q) for p, q in own.items()})
    return {"weights": params, "scales": trained}, {"scales": constants}


@partial(jax.jit, static_argnums=(0, 1, 2))
@full_float32
def _descend(
    block: Block,
    quantized: Quantized,
    tuning: BlockTuning,
    params: Any,
    constants: Any,
    data: tuple[Array, Array],
    key: Any,
) -> Any:
    (z, y), optimizer = data, _optimizer(tuning)

    def loss(p: Any, rows: Array) -> Array:
        return relative_mse(y[rows], block(quantized(p, constants), z[rows]))

    def step(carry: tuple[Any, Any], t: Array) -> tuple[tuple[Any, Any], None]:
        p, state = carry
        rows = jax.random.permutation(jax.random.fold_in(key, t), z.shape[0])[: tuning.batch]
        grads = jax.grad(loss)(p, rows)
        if tuning.how == "sign":
            lr = (1.0 - (t.astype(jnp.float32) + 0.5) / tuning.steps) / tuning.steps
            return (_signed(p, grads, quantized.quantizers, constants["scales"], lr), state), None
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integer counts
            updates, state = optimizer.update(grads, state, p)
        return (optax.apply_updates(p, updates), state), None

    (p, _), _ = lax.scan(step, (params, optimizer.init(params)), jnp.arange(tuning.steps))
    return p


def _optimizer(tuning: BlockTuning) -> optax.GradientTransformation:
    """Adam on weights and, at its own rate, on what trains beside them; the rates fall by half a cosine to 1/20."""

    def adam(rate: float) -> optax.GradientTransformation:
        return optax.adam(warmup_cosine(rate, tuning.steps, 0, rate / 20), b1=0.9, b2=0.95)

    return optax.partition({"w": adam(tuning.rate), "s": adam(tuning.scale_rate)}, {"weights": "w", "scales": "s"})


def _signed(p: Any, grads: Any, own: Quantizers, constants: Any, lr: Array) -> Any:
    """A step of lr levels for quantized weights, of lr for what trains beside them; other weights stay."""
    leaves, by_weight = weights.leaves_by_path(p["weights"]), weights.leaves_by_path(grads["weights"])
    moved = {}
    for path, q in own.items():
        w = jnp.moveaxis(leaves[path], q.axis, -1)
        g = jnp.moveaxis(by_weight[path], q.axis, -1)
        scales = constants[path]["scales"] if path in constants else q.format.fit(w)
        size = per_weight(jnp.abs(q.format.columns(scales, w.shape)[0]), w)
        moved[path] = jnp.moveaxis(w - lr * size * jnp.sign(g), -1, q.axis)
    beside = jax.tree.map(lambda x, g: x - lr * jnp.sign(g), p["scales"], grads["scales"])
    return {"weights": weights.replaced(p["weights"], moved), "scales": beside}


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def _loss(
    block: Block, quantized: Quantized, params: Any, constants: Any, data: tuple[Array, Array]
) -> Float[Array, ""]:
    (z, y), fake = data, quantized(params, constants)
    return relative_mse(y, lax.map(lambda one: block(fake, one[None])[0], z))


@partial(jax.jit, static_argnums=0)
@full_float32
def _outputs(block: Block, params: Any, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
    return lax.map(lambda one: block(params, one[None])[0], x)
