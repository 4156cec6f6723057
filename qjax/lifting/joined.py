"""Weights that the program joins into one array: q, k and v side by side, experts stacked from a list.

    x @ concatenate([wq, wk, wv], 1)  =  concatenate([x @ wq, x @ wk, x @ wv], -1)

Each part stays a weight with uses of its own, as long as the axis along which they are joined is not contracted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.lifting import packed
from qjax.lifting.jax_names import LEAFWISE, bind
from qjax.lifting.layout import rearrange
from qjax.lifting.weight import Weight
from qjax.tensor import is_qtensor


@partial(jax.tree_util.register_dataclass, data_fields=("parts",), meta_fields=("axis",))
@dataclasses.dataclass(frozen=True)
class Joined:
    """Weights, and arrays among them, one behind the other along an axis, counted from the front."""

    parts: tuple[Any, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = self.edges[-1]
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return len(self.parts[0].shape)

    @property
    def edges(self) -> list[int]:
        """Where each part begins, and the end."""
        return [0, *np.cumsum([part.shape[self.axis] for part in self.parts]).tolist()]

    def array(self, parts: Sequence[Any]) -> Any:
        """One array of decoded parts."""
        return lax.concatenate(parts, self.axis)


def is_followed(value: Any) -> bool:
    """Whether a value of the program is a weight, or several joined."""
    return isinstance(value, Weight | Joined)


def join(eqn: Any, values: Sequence[Any]) -> Joined | None:
    """The result of a concatenate or stack with weights among its operands; None where joined ones are joined anew."""
    stack = eqn.primitive.name == "stack"
    axis = eqn.params["axis" if stack else "dimension"]
    parts: list[Any] = []
    for v in values:
        if isinstance(v, Joined) and (stack or v.axis != axis):
            return None
        parts += v.parts if isinstance(v, Joined) else [_expanded(v, axis) if stack else v]
    return Joined(tuple(parts), axis)


def _expanded(value: Any, axis: int) -> Any:
    """With a new axis of length 1."""
    if not isinstance(value, Weight):
        return jnp.expand_dims(value, axis)
    shape = (*value.shape[:axis], 1, *value.shape[axis:])
    axes = (*value.axes[:axis], (), *value.axes[axis:])
    return value.map(lambda x: packed.reshape(x, shape) if is_qtensor(x) else x.reshape(shape), axes)


def moved(eqn: Any, whole: Joined) -> Any | None:
    """The result of an equation that rearranges all parts alike, or takes one of them; None where it does neither."""
    name = eqn.primitive.name
    if name == "slice" and eqn.params["strides"] is None:
        return _one_part(whole, eqn.params["start_indices"], eqn.params["limit_indices"])
    if name not in ("transpose", "convert_element_type", *LEAFWISE):
        return None
    axis = eqn.params["permutation"].index(whole.axis) if name == "transpose" else whole.axis
    parts = []
    for part in whole.parts:
        new = rearrange(eqn, [part]) if isinstance(part, Weight) else bind(eqn, [part])
        if new is None:
            return None
        parts.append(new[0])
    return Joined(tuple(parts), axis)


def _one_part(whole: Joined, start: Sequence[int], limit: Sequence[int]) -> Any | None:
    """The part that a slice takes, if it takes exactly one."""
    others = [a for a in range(whole.ndim) if a != whole.axis]
    if any((start[a], limit[a]) != (0, whole.shape[a]) for a in others):
        return None
    edges, cut = whole.edges, (start[whole.axis], limit[whole.axis])
    return next((p for k, p in enumerate(whole.parts) if (edges[k], edges[k + 1]) == cut), None)


def divided(eqn: Any, whole: Joined, x: Any, weight_first: bool) -> tuple[list[Any], int] | None:
    """A dot_general part by part.

    Returns: the activation of each part, and the axis along which their results are joined; None where the joined axis
      is contracted.
    """
    contract, batch = eqn.params["dimension_numbers"]
    w, other = (0, 1) if weight_first else (1, 0)
    if whole.axis in contract[w]:
        return None
    if whole.axis in batch[w]:
        nth = batch[w].index(whole.axis)
        along, edges = batch[other][nth], whole.edges
        cut = [lax.slice_in_dim(x, a, b, axis=along) for a, b in pairwise(edges)]
        return cut, nth
    free = [a for a in range(whole.ndim) if a not in (*contract[w], *batch[w])]
    tokens = jnp.ndim(x) - len(contract[w]) - len(batch[w])
    return [x for _ in whole.parts], len(batch[w]) + (0 if weight_first else tokens) + free.index(whole.axis)
