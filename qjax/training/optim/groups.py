"""One optimizer for parameters of several kinds: each group with its own rate, decay and clipping.

    g <- g min(1, clip / |g|)                    |g| over the leaves of the group alone
    d  = m / (sqrt(v) + eps) + decay p           m, v: Adam's moments of g, corrected for their start at 0
    p <- p - rate schedule(t) d                  decay = 0 for vectors (less than two axes)

This is AdamW (Loshchilov & Hutter, arXiv:1711.05101), run by `optax.partition`. The gradient of a scale is a sum over
all weights that share it and would dominate a common norm, hence the norms by group. Under Adam a constant factor on a
gradient cancels (the 1 / sqrt(N Qp) of LSQ, Esser et al., arXiv:1902.08153, section 2.2), so that scales are tuned by
their rate: about ten times that of the weights in EfficientQAT (Chen et al., arXiv:2407.11062).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qjax.errors import UserError
from qjax.plan.rules import fits
from qjax.typing import Array, Float, Int

ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are trained alike.

    Attributes:
      name: its label, for logs.
      pattern: a shell glob over the whole path of a leaf ("scales/*"), or `re:` and a regular expression.
      rate: times the schedule: a factor where the schedule is a learning rate, a learning rate where its peak is 1.
      weight_decay: decoupled, times the learning rate; matrices only.
      clip: the largest norm of the group's gradient; None: any.
      frozen: the group stays as it is.
      wrap: what goes around the group's optimizer, such as `parq`.
    """

    name: str
    pattern: str
    rate: float = 1.0
    weight_decay: float = 0.0
    clip: float | None = None
    frozen: bool = False
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None

    def matches(self, path: str) -> bool:
        return fits(self.pattern, path, f"group {self.name!r}:")


def partitioned(
    groups: Sequence[Group], schedule: optax.Schedule | float, scale: optax.GradientTransformation = ADAM
) -> optax.GradientTransformation:
    """Train every group of parameters in its own way.

    Args:
      groups: in order: a leaf belongs to the first group whose pattern fits its path.
      schedule: from the step (f32) to what the rates multiply, or a constant.
      scale: from clipped gradients to directions, before decay and rate: `optax.identity()` is SGD.

    Returns: an optax transformation; its `update` wants the parameters.

    Raises:
      UserError: (in `init`) see `labels`.
    """

    def of(group: Group) -> optax.GradientTransformation:
        if group.frozen:
            return optax.set_to_zero()
        chained = optax.chain(
            optax.identity() if group.clip is None else optax.clip_by_global_norm(group.clip),
            scale,
            optax.add_decayed_weights(group.weight_decay, mask=_matrices) if group.weight_decay else optax.identity(),
            optax.scale_by_learning_rate(_rate(group, schedule)),
        )
        return chained if group.wrap is None else group.wrap(chained)

    return promoting(optax.partition({g.name: of(g) for g in groups}, lambda tree: labels(tree, groups)))


def restrained(optimizer: optax.GradientTransformation, groups: Sequence[Group]) -> optax.GradientTransformation:
    """A user's optimizer, complete with its rate, on all groups but those that are frozen, and inside their wraps."""
    apart = {g.name: g.wrap(optimizer) if g.wrap else optax.set_to_zero() for g in groups if g.wrap or g.frozen}
    if not apart:
        return promoting(optimizer)

    def names(tree: Any) -> Any:
        return jax.tree.map(lambda name: name if name in apart else "", labels(tree, groups))

    return promoting(optax.partition({**apart, "": optimizer}, names))


def promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same under JAX's standard promotion of types, whatever the caller's: optax mixes floats with integers."""

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return optax.with_extra_args_support(optimizer).update(grads, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def labels(tree: Any, groups: Sequence[Group]) -> Any:
    """The name of each leaf's group, in a tree like `tree`.

    Raises:
      UserError: a leaf in no group, a group without a leaf, two groups of one name, a broken regular expression.

    >>> labels({"scales": {"s": 0.0}, "weights": {"w": 0.0}}, [Group(n, f"{n}/*") for n in ("scales", "weights")])
    {'scales': {'s': 'scales'}, 'weights': {'w': 'weights'}}
    """
    named, structure = jax.tree_util.tree_flatten_with_path(tree)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two groups are called {name!r}; give each its own name")
    found = [next((g.name for g in groups if g.matches(path)), None) for path in paths]
    if None in found:
        path = paths[found.index(None)]
        raise UserError(
            f"no group takes the parameter {path!r}; add a Group whose pattern fits it (frozen=True: it stays)"
        )
    for group in groups:
        if group.name not in found:
            taken = next((path for path in paths if group.matches(path)), None)
            why = f"parameters are named like {paths[0]!r}" if paths else "there is no parameter"
            if taken is not None:
                why = f"{taken!r} fits, but belongs to the earlier group {found[paths.index(taken)]!r}"
            raise UserError(f"group {group.name!r} takes no parameter: its pattern is {group.pattern!r}; {why}")
    return jax.tree.unflatten(structure, found)


def rates(
    groups: Sequence[Group], schedule: optax.Schedule | float, step: int | Int[Array, ""]
) -> dict[str, Float[Array, ""]]:
    """The learning rate of each group at a step, f32[] by name; 0 where it is frozen."""
    return {g.name: jnp.float32(0.0 if g.frozen else _rate(g, schedule)(step)) for g in groups}


def grad_norms(grads: Any, labels: Any) -> dict[str, Float[Array, ""]]:
    """The norm of each group's gradient before clipping, f32[] by name.

    Args:
      grads: gradients, or parameters, or updates.
      labels: of the same tree, from `labels`.
    """
    members: dict[str, list[Array]] = {}
    for name, grad in zip(jax.tree.leaves(labels), jax.tree.leaves(grads), strict=True):
        members.setdefault(name, []).append(grad)
    return {name: optax.tree.norm(leaves) for name, leaves in members.items()}


def ema_update(ema: Any, params: Any, decay: float, step: int | Int[Array, ""]) -> Any:
    """One step of the moving average of parameters, which starts as the parameters themselves.

        ema <- d ema + (1 - d) params        d = min(decay, (1 + t) / (10 + t))

    The short memory of the first steps makes a correction for the start needless. An average of weights lies between
    the levels of the grid: judge it after quantization, never as it is.

    Args:
      ema: the average so far.
      params: the parameters after the step.
      decay: of a step, once there are enough of them.
      step: t, counted from 0.
    """
    t = jnp.asarray(step, jnp.float32)
    return optax.incremental_update(params, ema, 1.0 - jnp.minimum(decay, (1.0 + t) / (10.0 + t)))


def _rate(group: Group, schedule: optax.Schedule | float) -> Callable[[Any], Any]:
    value = schedule if callable(schedule) else optax.constant_schedule(schedule)
    return lambda step: group.rate * value(jnp.asarray(step, jnp.float32))


def _matrices(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
