"""A weight on its way to its use, and the record of a use.

The interpreter carries a leaf of the params tree through transposes, reshapes and slices as a `Weight`: the array (or
QTensor) in its present arrangement, and for each of its present axes the stored axes that it came from.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import jax

from qjax.errors import UserError
from qjax.lifting.picked import Picked, is_picked
from qjax.tensor import dequantize, is_qtensor

# Where one present axis came from: (-2,) is the stored axis -2; (-2, 0) and (-2, 1) the halves of a split one; (0,) is
# the first axis of an index.
Label = tuple[int, ...]
Axes = tuple[tuple[Label, ...], ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of one leaf of the params tree.

    Attributes:
      path: the leaf's name, e.g. "layers_0/attn/q/kernel".
      kind: "dot" (contracted with an activation), "gather" (rows looked up), "conv" (a convolution's kernel), or
        "other".
      axis: the stored axis that is contracted, or that holds a looked-up row's features, counted from the end. With
        several contracted axes the last of them; None where kind is "conv" or "other".
      source: equal for two uses that read the same activation in the same arrangement; -1 where kind is "conv" or
        "other".
      shape: the leaf's shape as stored.
      stacked: lengths of the scans around the use, outermost first: statistics and taps have these leading axes.
      axes: all contracted axes, in the order in which they are merged.
      scanned: the leaf's own axes that those scans step over; () for a weight that every step shares.
      levels: for each of these, which of `stacked` steps over it.
      nth: how many dots and gathers of the same leaf come before this one.
      batch: how many axes the dot shares between weight and activation (batch axes of the dot_general, but those of
        an index); they come first in the activation that a visitor sees.
      note: why a packed leaf could not stay packed here; "" if it did, or if the leaf is dense.
      primitive: what uses it, "dot_general" or another of JAX's primitives.
      shared: the leaf's own axes that `batch` counts.
      picked: those of a stack that are taken by an index known at run time (experts): a statistic is stacked on these
        axes, behind those of scans and before those of `batch`.
      at: entries of a stack that the program names: ((-3, 2),) in x @ w[2].
    """

    path: str
    kind: Literal["dot", "gather", "conv", "other"]
    axis: int | None
    source: int
    shape: tuple[int, ...]
    stacked: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    scanned: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    nth: int = 0
    note: str = ""
    batch: int = 0
    primitive: str = ""
    shared: tuple[int, ...] = ()
    picked: tuple[int, ...] = ()
    at: tuple[tuple[int, int], ...] = ()

    @property
    def key(self) -> str:
        """The use's own name: the path for the first dot or gather of a leaf, then path#1, path#2 ..."""
        return f"{self.path}#{self.nth}" if self.nth else self.path


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "picks"),
    meta_fields=("path", "stored", "axes", "dtype", "scanned", "levels"),
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A leaf of the params tree inside the interpreter.

    Attributes:
      value: an array, a QTensor, or {axis: array} where a leaf has a value of its own for each contracted axis (0: for
        all else).
      path, stored: the leaf's name and its shape in the params tree.
      axes: for each present axis the stored axes it came from.
      dtype: the type that the plain function sees here.
      scanned: stored axes that a scan has taken off.
      levels: for each of these, how many scans lie around the one that did.
      picks: entries of stored axes that were taken by index.
    """

    value: Any
    path: str
    stored: tuple[int, ...]
    axes: Axes
    dtype: Any
    scanned: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    picks: tuple[Picked, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return jax.tree.leaves(self.value, is_leaf=is_qtensor)[0].shape

    @property
    def packed(self) -> bool:
        return is_qtensor(self.value)

    def array(self, axis: int | None = 0) -> Any:
        """The weight as a plain array; `axis` picks among values of their own."""
        if is_qtensor(self.value):
            return dequantize(self.value).astype(self.dtype)
        return self.value.get(axis, self.value[0]) if isinstance(self.value, dict) else self.value

    def map(self, fn: Any, axes: Axes, **changes: Any) -> Weight:
        """The weight after `fn` on its value and with new axes."""
        value = jax.tree.map(fn, self.value, is_leaf=is_qtensor)
        return dataclasses.replace(self, value=value, axes=axes, **changes)


class Dense(Exception):
    """Raised where a packed weight cannot stay packed; the message completes "<primitive> ..."."""


def as_weight(path: str, leaf: Any) -> Weight:
    """A leaf of the params tree as the interpreter receives it."""
    shape = tuple(leaf.shape)
    axes = tuple(((i - len(shape),),) for i in range(len(shape)))
    return Weight(leaf, path, shape, axes, leaf.dtype)


def whole_axes(weight: Weight, present: tuple[int, ...]) -> tuple[int, ...] | None:
    """The stored axes that some present axes make up, in order, or None if they hold only a part of them."""
    own = [a for a in present if not is_picked(weight.axes[a])]
    axes = tuple(sorted({label[0] for a in own for label in weight.axes[a]}))
    full = math.prod(weight.stored[a] for a in axes)
    return axes if axes and full == math.prod(weight.shape[a] for a in own) else None


def refuse(weight: Weight, primitive: str, reason: str) -> UserError:
    """The error of strict mode, with the weight, the primitive and the reason in it."""
    name = f"{weight.path!r} {list(weight.stored)}"
    if not weight.packed:
        return UserError(f"weight {name} goes out of sight: {primitive} {reason}")
    return UserError(
        f"{weight.value.format.name} weight {name} cannot stay packed: {primitive} {reason}; rewrite that use, keep "
        "the weight dense, or pass strict=False to decode it there"
    )
