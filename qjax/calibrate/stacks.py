"""Which matrix of a stack a sum belongs to: the axes of scans, of indices and of batches as the weight has them.

sums [*steps, *picked, *batch, ...]   ->   sums [*stack, ...]      stack: the weight's own leading axes, as stored
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.lifting import Use
from qjax.stats import Stats

Entry = tuple[int, tuple[int, ...]]


def entry(use: Use) -> Entry:
    """What has one sum: an input, and those of the scans around it that step over the weight as well."""
    return use.source, tuple(sorted(set(use.levels)))


def own_axes(use: Use) -> tuple[int, ...]:
    """The weight's stored axes in the order in which its sums have them in front."""
    return (*dict.fromkeys(use.scanned), *use.picked, *dict.fromkeys(use.shared))


def stacked(stats: Stats, use: Use) -> Stats:
    """The sums of one use, stacked as the weight is; entries that the use has nothing to do with are zero.

    Raises:
      UserError: the use reads a part of the stack, or one that does not lie in front of its matrices.
    """
    own, steps = own_axes(use), len(entry(use)[1]) + len(use.picked) + use.batch
    lengths = tuple(use.shape[axis] for axis in own)
    found = () if stats.count is None else stats.count.shape
    if math.prod(lengths) != math.prod(found):
        what = "a scan steps over" if use.scanned else f"{use.primitive} reads"
        raise UserError(f"{use.path}: {what} a part of its stack of {list(lengths)}; make that part a weight")
    stack = sorted({*own, *(axis for axis, _ in use.at)})
    others = [axis for axis in range(-len(use.shape), 0) if axis not in use.axes]
    if stack != others[: len(stack)]:
        raise UserError(
            f"{use.path}: {use.primitive} reads matrices of {list(use.shape)} that are stacked on axes {stack}, and "
            f"contracted along {list(use.axes)}; a stack comes before the other axes: store the weight so"
        )
    where: Any = tuple(dict(use.at).get(axis, slice(None)) for axis in stack)

    def place(a: Any) -> Any:
        a = a.reshape(*lengths, *a.shape[steps:])
        a = a.transpose(*np.argsort(own), *range(len(own), a.ndim))
        if not use.at:
            return a
        whole = jnp.zeros((*(use.shape[axis] for axis in stack), *a.shape[len(own) :]), a.dtype)
        return whole.at[where].set(a)

    return jax.tree.map(place, stats)
