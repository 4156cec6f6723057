"""Operations that only rearrange a weight: it stays a weight, and its axes keep their names.

Each rule answers two questions for one primitive: which stored axes do the new axes come from, and how is a QTensor
rearranged. A dense weight goes through the primitive itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.lifting import packed, picked
from qjax.lifting.jax_names import LEAFWISE, bind
from qjax.lifting.weight import Axes, Dense, Weight
from qjax.tensor import is_qtensor


def rearrange(eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """The results of an equation that only rearranges its one weight, or None if it does something else.

    Raises:
      Dense: it rearranges, but this packed weight cannot follow.
    """
    weight, name = values[0], eqn.primitive.name
    if name == "optimization_barrier":
        return list(jax.lax.optimization_barrier(tuple(values)))
    if name in LEAFWISE:
        return [weight.map(lambda x: jax.tree.map(lambda leaf: bind(eqn, [leaf])[0], x), weight.axes)]
    if name not in _AXES or not isinstance(weight, Weight) or any(isinstance(v, Weight) for v in values[1:]):
        return None
    axes = _AXES[name](eqn, weight)
    if axes is None:
        return None
    out = eqn.outvars[0].aval
    if name == "convert_element_type":
        # Packed weights stay as they are: dot and lookup give the type of the plain function's result.
        return [weight.map(lambda x: x if is_qtensor(x) else bind(eqn, [x])[0], axes, dtype=out.dtype)]
    if name == "split":
        edges = np.cumsum([0, *eqn.params["sizes"]]).tolist()
        return [_piece(weight, eqn.params["axis"], *cut) for cut in pairwise(edges)]
    if name == "unstack":
        axis = eqn.params["axis"]
        one_by_one = (_piece(weight, axis, k, k + 1) for k in range(weight.shape[axis]))
        return [p.map(lambda x: _without(x, axis), (*p.axes[:axis], *p.axes[axis + 1 :])) for p in one_by_one]

    def move(x: Any) -> Any:
        return _PACKED[name](x, eqn, values) if is_qtensor(x) else bind(eqn, [x, *values[1:]])[0]

    if name in ("slice", "dynamic_slice", "gather"):
        weight = _remembering(eqn, weight, values)
        axes = weight.axes
    return [weight.map(move, axes)]


def _remembering(eqn: Any, weight: Weight, values: Sequence[Any]) -> Weight:
    """The weight before a cut that knows which entries the cut takes."""
    name = eqn.primitive.name
    if name == "gather":
        return picked.gathered(weight, values[1], eqn.params, eqn.outvars[0].aval.ndim)
    if name == "slice":
        return picked.sliced(weight, eqn.params["start_indices"], eqn.outvars[0].aval.shape)
    return picked.sliced(weight, values[1:], eqn.params["slice_sizes"])


def _piece(weight: Weight, axis: int, start: int, stop: int) -> Weight:
    """The weight cut to a part of one axis."""
    starts, limits = [0] * len(weight.shape), list(weight.shape)
    starts[axis], limits[axis] = start, stop
    known = picked.sliced(weight, starts, [b - a for a, b in zip(starts, limits, strict=True)])

    def cut(x: Any) -> Any:
        return packed.static_slice(x, starts, limits) if is_qtensor(x) else jax.lax.slice(x, starts, limits)

    return known.map(cut, known.axes)


def _without(x: Any, axis: int) -> Any:
    return packed.squeeze(x, (axis,)) if is_qtensor(x) else x.squeeze(axis)


# --- which stored axes the new axes come from ---------------------------------------------------------------------


def _same(eqn: Any, weight: Weight) -> Axes | None:
    return weight.axes


def _converted(eqn: Any, weight: Weight) -> Axes | None:
    return weight.axes if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


def _transposed(eqn: Any, weight: Weight) -> Axes | None:
    return tuple(weight.axes[a] for a in eqn.params["permutation"])


def _squeezed(eqn: Any, weight: Weight) -> Axes | None:
    return tuple(labels for a, labels in enumerate(weight.axes) if a not in eqn.params["dimensions"])


def _expanded(eqn: Any, weight: Weight) -> Axes | None:
    """New axes of length 1 only: a weight that is repeated is an activation."""
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if any(size != 1 for a, size in enumerate(shape) if a not in kept):
        return None
    if any(shape[a] != size for a, size in zip(kept, weight.shape, strict=True)):
        return None
    return tuple(weight.axes[kept.index(a)] if a in kept else () for a in range(len(shape)))


def _reshaped(eqn: Any, weight: Weight) -> Axes | None:
    """Walk old and new shape in runs of equal products; what a run splits gets labels of its own, in stored order."""
    if eqn.params["dimensions"] is not None:
        return None
    old, new = weight.shape, eqn.params["new_sizes"]
    if 0 in old:
        return None
    axes: list[tuple[tuple[int, ...], ...]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [i] if i < len(old) else [], [j] if j < len(new) else []
        a, b = (old[i] if olds else 1), (new[j] if news else 1)
        i, j = i + len(olds), j + len(news)
        while a != b:
            if a < b:
                a, olds, i = a * old[i], [*olds, i], i + 1
            else:
                b, news, j = b * new[j], [*news, j], j + 1
        labels = tuple(label for o in olds for label in weight.axes[o])
        axes += [labels if len(news) == 1 else tuple((*label, k) for label in labels) for k in range(len(news))]
    return tuple(axes)


_AXES: dict[str, Callable[[Any, Weight], Axes | None]] = {
    "convert_element_type": _converted,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "broadcast_in_dim": _expanded,
    "slice": _same,
    "split": _same,
    "unstack": _same,
    "dynamic_slice": _same,
    "gather": _same,
    "sharding_constraint": _same,
}


# --- how a QTensor is rearranged -----------------------------------------------------------------------------------


def _pick(q: Any, eqn: Any, values: Sequence[Any]) -> Any:
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        raise Dense('fills out-of-range indices, which packed matrices cannot be: index w[i], or take with mode="clip"')
    return packed.gather(q, values[1], eqn.params)


def _constrain(q: Any, eqn: Any, values: Sequence[Any]) -> Any:
    """A sharding constraint speaks of the logical axes; each leaf gets its part of it."""
    sharding = eqn.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return q
    shardings = jax.tree.map(
        lambda p: jax.sharding.NamedSharding(sharding.mesh, p), packed.spec(q, tuple(sharding.spec))
    )
    return jax.tree.map(jax.lax.with_sharding_constraint, q, shardings)


_PACKED: dict[str, Callable[[Any, Any, Sequence[Any]], Any]] = {
    "transpose": lambda q, eqn, _: packed.transpose(q, eqn.params["permutation"]),
    "reshape": lambda q, eqn, _: packed.reshape(q, eqn.params["new_sizes"]),
    "squeeze": lambda q, eqn, _: packed.squeeze(q, eqn.params["dimensions"]),
    "broadcast_in_dim": lambda q, eqn, _: packed.reshape(q, eqn.params["shape"]),
    "slice": lambda q, eqn, _: packed.static_slice(
        q, *(eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    ),
    "dynamic_slice": lambda q, eqn, values: packed.dynamic_slice(q, values[1:], eqn.params["slice_sizes"]),
    "gather": _pick,
    "sharding_constraint": _constrain,
}
