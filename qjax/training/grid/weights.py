"""The weights of a params tree in training: which are quantized and how, their values, their export.

    state = init(params, quantizers)          scales that train, and the constants beside them
    fake_params(params, ...)                  the tree that the model runs on: quantized weights at their stored values
    packed_params(params, ...)                the tree that is exported: QTensors of exactly these values

Weights of one shape and one quantizer are stacked and quantized by one loop, small ones several at once: a search over
scales is compiled once, not once a layer, and what it computes on the way is in memory for a few weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.pipeline.memory import contracted_axis, named_weight
from qjax.plan import Plan
from qjax.tensor import dequantize, is_qtensor
from qjax.training.grid.estimators import Estimator, position_of
from qjax.training.grid.quantizer import Quantizer, ScaleKind
from qjax.training.grid.scale_rules import OWN, ScaleRule
from qjax.typing import Array, Float

Quantizers = Mapping[str, Quantizer]
ByPath = dict[str, Any]  # {path: {name: array}}

_AT_ONCE = 1 << 22  # weights whose intermediates, a dozen times their size, are in memory together


def quantizers_of(
    params: Any,
    plan: Plan,
    *,
    scales: ScaleKind = "refit",
    estimator: Estimator | None = None,
    rule: ScaleRule = OWN,
    axes: Mapping[str, Any] | None = None,
) -> dict[str, Quantizer]:
    """How a plan's weights are quantized while they train.

    Args:
      params: a tree of floats, or of their shapes.
      plan: patterns over the leaves' paths -> formats; recipes in it say how the start is rounded, not the training.
      scales, estimator, rule: see `Quantizer`.
      axes: {path: contracted axis}, as `qjax.contracted_axes` finds them; else embeddings -1, kernels -2.

    Returns: {path: Quantizer} of the weights that the plan does not keep.

    Raises:
      UserError: what `Plan.assign` raises (a rule that matches nothing among it), or a plan that quantizes nothing.
    """
    axes = axes or {}
    leaves = leaves_by_path(params)
    quantizers: dict[str, Quantizer] = {}
    for one in plan.assign(named_weight(path, leaf, axes) for path, leaf in leaves.items()):
        if one.format is not None:
            path = one.weight.path
            axis = axes.get(path, contracted_axis(path, leaves[path].ndim))
            if isinstance(axis, tuple):
                raise UserError(
                    f"{path}: is contracted along {axis} together, which no training knows; keep it in the plan"
                )
            quantizers[path] = Quantizer(one.format, axis, scales, estimator, rule)
    if not quantizers:
        raise UserError(f"plan {plan.name!r} keeps every weight: there is nothing to train through")
    return quantizers


def init(params: Any, quantizers: Quantizers, importance: Mapping[str, Array] | None = None) -> tuple[ByPath, ByPath]:
    """What trains beside the weights, and the constants: {path: {...}} each, of the weights as they are now.

    Args:
      params: a tree of floats; QTensors in it, any recipe's result, give their own scales instead of a new fit.
      importance: {path: f32[n]}, the mean squared input of each position of the contracted axis, for the fit; kept with
        frozen scales, for every later one.
    """
    importance = importance or {}
    leaves = leaves_by_path(params)
    check_paths(quantizers, leaves)
    beside = {
        path: quantizer.init_from(leaves[path])
        if is_qtensor(leaves[path])
        else quantizer.init(leaves[path], importance.get(path))
        for path, quantizer in quantizers.items()
    }
    for path, quantizer in quantizers.items():
        if quantizer.scales == "frozen" and path in importance:
            beside[path][1]["importance"] = importance[path]
    return {p: t for p, (t, _) in beside.items() if t}, {p: k for p, (_, k) in beside.items() if k}


def start_weights(w: Array, q: Any, quantizer: Quantizer) -> Array:
    """Where a recipe's result starts to train: its values, moved towards the float weights as far as their cells go.

    The codes are the recipe's (error feedback's are not the nearest), and a weight near a border stays near it.
    """
    scales, codes = q.format.unpack(q.leaves)
    x = jnp.moveaxis(jnp.asarray(w, jnp.float32), quantizer.axis, -1)
    x_hat = q.format.decode(scales, codes)
    place = position_of(q.format, scales, x, x_hat)
    reach = (0.49 * place.neighbour() * jnp.abs(place.s)).reshape(x.shape)
    return jnp.moveaxis(x_hat + jnp.clip(x - x_hat, -reach, reach), -1, quantizer.axis)


def started(params: Any, rounded: Any, quantizers: Quantizers) -> Any:
    """The float weights from which a recipe's result for `params` starts to train, see `start_weights`.

    Args:
      params: the float weights.
      rounded: the same tree with QTensors; its dense leaves are taken as they are.

    Raises:
      UserError: a weight packed there that stays float in training, or whose scales are refit at every step.
    """
    packed, moved = leaves_by_path(rounded), {}
    for path, w in leaves_by_path(params).items():
        q = packed[path]
        if not is_qtensor(q):
            continue
        if path not in quantizers:
            raise UserError(
                f"{path}: the start has it in {q.format.name}, here it trains in float; use one plan for both, as an "
                "arm's `grid.plan(config)`"
            )
        if quantizers[path].scales == "refit":
            raise UserError(f"{path}: refit scales would not keep a recipe's grid; take frozen or learned ones")
        moved[path] = start_weights(w, q, quantizers[path])
    return replaced(rounded, moved)


def fake_params(params: Any, quantizers: Quantizers, trained: ByPath, constants: ByPath) -> Any:
    """The tree with every quantized weight at its stored value, f32; gradients reach weights and what trains."""
    return replaced(params, mapped(Quantizer.fake, leaves_by_path(params), quantizers, trained, constants))


def packed_params(params: Any, quantizers: Quantizers, trained: ByPath, constants: ByPath) -> Any:
    """The tree with every quantized weight as a QTensor of exactly the values that `fake_params` gives."""
    return replaced(params, mapped(Quantizer.pack, leaves_by_path(params), quantizers, trained, constants))


def refit(params: Any, quantizers: Quantizers, constants: ByPath) -> ByPath:
    """`constants` with frozen scales fitted anew to the weights as they are, by the same importance."""
    leaves = leaves_by_path(params)
    frozen = {path: q for path, q in quantizers.items() if q.scales == "frozen"}

    def fitted(q: Quantizer, w: Array, t: ByPath, k: ByPath) -> ByPath:
        return k | q.init(w, k.get("importance"))[1]

    new = mapped(fitted, leaves, frozen, {}, constants)
    return constants | new


def statistics(
    params: Any, quantizers: Quantizers, trained: ByPath, constants: ByPath
) -> tuple[dict[str, Array], ByPath]:
    """What quantization does to the weights now.

    Returns: {"quant_noise": |W - W_hat| / |W| over all quantized weights, "saturated": the mean share of weights
      outside of their grid, and of learned scales "scale_drift": the root mean square of ln(scale / its start)}, and
      {path: codes} to compare with those of another step (`flip_rate`).
    """
    leaves = leaves_by_path(params)

    def one(q: Quantizer, w: Array, t: ByPath, k: ByPath) -> tuple[Array, ...]:
        scales, codes = q.encode(w, t, k)
        x = jnp.moveaxis(w.astype(jnp.float32), q.axis, -1)
        error = x - q.format.decode(scales, codes)
        return jnp.sum(error * error), jnp.sum(x * x), q.saturated(w, scales, codes), codes

    all_of = mapped(one, leaves, quantizers, trained, constants)
    noise, power, saturated = (sum(r[i] for r in all_of.values()) for i in range(3))
    out = {"quant_noise": jnp.sqrt(noise / power), "saturated": saturated / len(all_of)}
    moved = [t["scale"] for t in trained.values() if "scale" in t]  # s = s0 exp(scale)
    if moved:
        out["scale_drift"] = jnp.sqrt(sum(jnp.sum(x * x) for x in moved) / sum(x.size for x in moved))
    return out, {path: r[3] for path, r in all_of.items()}


@jax.jit
def flip_rate(before: ByPath, now: ByPath) -> Float[Array, ""]:
    """The share of codes that changed."""
    flipped = sum(jnp.sum((before[p] != now[p]).astype(jnp.float32)) for p in now)
    return flipped / jnp.float32(max(1, sum(codes.size for codes in now.values())))


def check_same_values(packed: Any, trained_on: Any) -> None:
    """Raise UserError, naming the weight, unless a packed tree decodes to exactly the values that training ran on."""
    values = leaves_by_path(trained_on)
    for path, leaf in leaves_by_path(packed).items():
        if is_qtensor(leaf):
            off = int(jnp.sum(dequantize(leaf) != values[path]))
            if off:
                raise UserError(f"{path}: {off} of {leaf.size} stored values are not those that were trained")


def leaves_by_path(params: Any) -> dict[str, Any]:
    """{path: leaf}, with QTensors as leaves."""
    named = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def check_paths(named: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Raise UserError for a name that is no leaf's."""
    for path in named:
        if path not in leaves:
            raise UserError(f"no weight is called {path!r}; they are called like {next(iter(leaves))!r}")


def mapped(
    fn: Callable[..., Any], leaves: Mapping[str, Any], quantizers: Mapping[str, Any], trained: ByPath, constants: ByPath
) -> dict[str, Any]:
    """{path: fn(quantizer, weight, trained, constants)}, weights alike in all of these in one call.

    `quantizers` may be any records that say which packed weights are alike.
    """
    check_paths(quantizers, leaves)
    groups: dict[Any, list[str]] = {}
    for path, quantizer in quantizers.items():
        beside = jax.tree.structure((trained.get(path), constants.get(path)))
        groups.setdefault((quantizer, leaves[path].shape, str(leaves[path].dtype), beside), []).append(path)
    out: dict[str, Any] = {}
    for (quantizer, *_), paths in groups.items():
        each = [(leaves[p], trained.get(p, {}), constants.get(p, {})) for p in paths]
        if len(each) == 1:
            out[paths[0]] = fn(quantizer, *each[0])
            continue
        stack = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
        one = partial(fn, quantizer)
        whole = lax.map(lambda parts, one=one: one(*parts), stack, batch_size=_at_once(leaves[paths[0]], len(paths)))
        for i, path in enumerate(paths):
            out[path] = jax.tree.map(lambda x, i=i: x[i], whole)
    return {path: out[path] for path in quantizers}


def _at_once(weight: Any, count: int) -> int:
    """How many of `count` weights pass at once: a whole number of times, and one where one is large enough."""
    return max(n for n in range(1, count + 1) if count % n == 0 and n * weight.size <= max(_AT_ONCE, weight.size))


def replaced(params: Any, new: Mapping[str, Any]) -> Any:
    """The tree with other leaves under the paths that `new` names."""

    def pick(path: Any, leaf: Any) -> Any:
        return new.get(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_qtensor)
