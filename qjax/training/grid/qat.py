"""Quantization-aware training of any model, under the user's own loss, loop and optimizer.

    start, fake, export = qat(apply, params, plan)
    tree = start                                       {"weights": params, "scales": what trains beside them}
    loss(tree) = ... apply(fake(tree), x) ...          the forward runs on the values that are stored
    export(tree)                                       QTensors of exactly these values

The model is a function of (params, *inputs): `lambda p, x: module.apply({"params": p}, x)` of a linen module, or plain
arithmetic. The optimizer is any of optax; `optax.multi_transform` on the tree's two keys gives scales their own rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from qjax.errors import UserError
from qjax.formats import Format
from qjax.pipeline.memory import contracted_axes
from qjax.plan import Plan
from qjax.plan.named import as_plan
from qjax.tensor import is_qtensor
from qjax.training.grid import weights
from qjax.training.grid.estimators import Estimator
from qjax.training.grid.quantizer import Quantizer, ScaleKind
from qjax.training.grid.scale_rules import OWN, ScaleRule
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Quantized:
    """Quantized weights from the parts of a state, {"weights", "scales"}, whether they train or are constants.

    Equal for equal quantizers: what is compiled of one serves the other.

    Attributes:
      items: (path, quantizer) pairs; none: the float model.
    """

    items: tuple[tuple[str, Quantizer], ...] = ()

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        return dict(self.items)

    @property
    def exact(self) -> bool:
        """Whether what is exported holds the values that training ran on, which rounding would show."""
        return bool(self.items)

    def forward(self, apply: Any) -> Any:
        """A model of what `__call__` returns: the same."""
        return apply

    def __call__(self, params: Any, constants: Any) -> Any:
        """The tree that the model runs on."""
        return self._mapped(weights.fake_params, params, constants)

    @partial(jax.jit, static_argnums=0)
    def packed(self, params: Any, constants: Any) -> Any:
        """The tree that is exported."""
        return self._mapped(weights.packed_params, params, constants)

    def _mapped(self, fn: Callable[..., Any], params: Any, constants: Any) -> Any:
        w = float_weights(params, constants)
        return fn(w, self.quantizers, params.get("scales", {}), constants.get("scales", {})) if self.items else w


def float_weights(params: Any, constants: Any) -> Any:
    """The weights of a state's parts, as they are."""
    return params.get("weights", constants.get("weights"))


class QAT(NamedTuple):
    """What `qat` returns.

    Attributes:
      start: the tree to train, {"weights": float params, "scales": {path: {name: array}}}; no scales train under
        `scales="refit"` and "frozen", and the second is empty.
      fake: tree -> params with every quantized weight at its stored value, f32, differentiable. It is a pytree of the
        scales that stay: pass it to a jitted step as an argument where they are large.
      export: tree -> params with every quantized weight as a QTensor.
    """

    start: dict[str, Any]
    fake: Callable[[Any], Any]
    export: Callable[[Any], Any]


def qat(
    apply: Callable[..., Any],
    params: Any,
    plan: str | Format | Plan,
    *inputs: Any,
    scales: ScaleKind = "refit",
    estimator: Estimator | None = None,
    rule: ScaleRule = OWN,
    rounded: Any = None,
    importance: Mapping[str, Array] | None = None,
) -> QAT:
    """Three things that make a model train through its quantization.

    Args:
      apply: function of (params, *inputs).
      params: where training starts, a tree of floats.
      plan: a format's name, for all matrices, or patterns over the leaves' paths -> formats.
      inputs: examples of the model's inputs, arrays or `jax.ShapeDtypeStruct`: `apply` is traced on them to find the
        axis along which every weight is contracted. Without them a leaf called `embedding` has its blocks along its
        last axis, and every other matrix along the last but one, as flax stores kernels.
      scales: "refit" at every step, "frozen" at the start, "learned" (they train, at ten times the weights' rate to
        begin with) or "decoupled".
      estimator: what passes back through the rounding, see `qjax.training.grid.estimators`; None: straight through,
        and for learned scales straight through inside the grid.
      rule: where scales come from, see `qjax.training.grid.scale_rules`.
      rounded: a recipe's result for `params`, what `qjax.quantize_params` returned: training starts on its grid and
        its codes. Only for scales that are not refit.
      importance: {path: f32[in]}, the mean squared input of each channel, for the first fit of scales that are not.

    Returns: (start, fake, export); `fake` equals `qjax.dequantize` of `export`'s weights bit for bit, in jit and eager.

    Raises:
      UserError: what `Plan.assign` raises, each with the name of the rule or the weight; weights that are packed
        already; a recipe's result in another format than the plan's or under scales that are refit.

    >>> import jax, jax.numpy as jnp, optax, qjax
    >>> apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> p = {k: {"kernel": jax.random.normal(keys[i], (64, 64)) / 8} for i, k in enumerate("ab")}
    >>> start, fake, export = qjax.qat(apply, p, "int2_g64_mid_mse", scales="learned")
    >>> x = jax.random.normal(keys[2], (32, 64))
    >>> loss = jax.jit(lambda tree: jnp.mean((apply(fake(tree), x) - apply(p, x)) ** 2))
    >>> optimizer = optax.adam(3e-3)
    >>> tree, state, before = start, optimizer.init(start), loss(start)
    >>> for _ in range(20):
    ...     updates, state = optimizer.update(jax.grad(loss)(tree), state)
    ...     tree = optax.apply_updates(tree, updates)
    >>> packed = export(tree)
    >>> bool(loss(tree) < 0.7 * before), packed["a"]["kernel"].format.name
    (True, 'int2_g64_mid_mse')
    >>> bool((qjax.dequantize(packed["b"]["kernel"]) == fake(tree)["b"]["kernel"]).all())
    True
    """
    leaves = weights.leaves_by_path(params)
    for path, leaf in leaves.items():
        if is_qtensor(leaf):
            raise UserError(f"{path}: is packed already; train its floats, and give the packed tree as `rounded`")
    plan = as_plan(plan)
    axes = contracted_axes(apply, params, *inputs, plan=plan) if inputs else None
    quantizers = weights.quantizers_of(params, plan, scales=scales, estimator=estimator, rule=rule, axes=axes)
    masters = params if rounded is None else weights.started(params, rounded, quantizers)
    trained, constants = weights.init(params if rounded is None else rounded, quantizers, importance)
    quantized, constants = Quantized(tuple(quantizers.items())), {"scales": constants}
    return QAT(
        {"weights": masters, "scales": trained},
        jax.tree_util.Partial(quantized, constants=constants),
        partial(_exported, quantized, constants),
    )


def _exported(quantized: Quantized, constants: Any, tree: Any) -> Any:
    """The packed tree, after a look whether it is what training ran on."""
    packed = quantized.packed(tree, constants)
    weights.check_same_values(packed, jax.jit(quantized)(tree, constants))
    return packed
