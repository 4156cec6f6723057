"""Entries of a stack that a program takes by index: experts chosen for a token, layers taken one after the other.

    y[t] = x[t] . W[e[t]]        the statistic of W[k] is over the tokens t with e[t] = k, and of no others

A weight remembers which entries were taken (`Picked`). An axis of an index that the dot shares with the activation is
one of its token axes; an axis of its own (two experts for each token) repeats the token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@partial(jax.tree_util.register_dataclass, data_fields=("index",), meta_fields=("axis", "labels", "at"))
@dataclasses.dataclass(frozen=True)
class Picked:
    """Entries of one stored axis. With neither `at` nor `index` nobody knows which.

    Attributes:
      axis: the stored axis, counted from the end.
      labels: what the axes of `index` are called among the weight's present axes, numbers from 0 on.
      at: the entry, where the program names one.
      index: integers, where they are known only at run time.
    """

    axis: int
    labels: tuple[int, ...] = ()
    at: int | None = None
    index: Any = None

    @property
    def known(self) -> bool:
        return self.at is not None or self.index is not None


def is_picked(labels: Sequence[tuple[int, ...]]) -> bool:
    """Whether a present axis, by the labels of its origin, is one of an index: no stored axis of the weight."""
    return bool(labels) and all(label[0] >= 0 for label in labels)


def of_stack(picks: Sequence[Picked], axes: Sequence[int]) -> tuple[Picked, ...]:
    """The picks among a stack of matrices: in front of the last two stored axes and of the contracted ones."""
    return tuple(p for p in picks if axes and p.axis < min(-2, *axes))


def forget(picks: Sequence[Picked], labels: Sequence[tuple[int, ...]] | None = None) -> tuple[Picked, ...]:
    """The same without what is known: of all, or of those whose index has one of the labels."""
    gone = None if labels is None else {label[0] for label in labels}
    return tuple(Picked(p.axis) if gone is None or gone & set(p.labels) else p for p in picks)


def sliced(weight: Any, starts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """The weight that remembers which single entries `lax.slice` or `lax.dynamic_slice` took of its whole axes.

    Args:
      weight: as it was before the cut.
      starts: of each present axis, integers or arrays.
      sizes: what is left of each.
    """
    axes, picks = list(weight.axes), list(weight.picks)
    for a, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size != 1 or weight.shape[a] == 1:
            continue
        stored, axes[a] = sorted({label[0] for label in axes[a]}), ()
        if is_picked(weight.axes[a]):
            picks = list(forget(picks, weight.axes[a]))
        elif len(stored) != 1 or weight.stored[stored[0]] != weight.shape[a]:
            picks += [Picked(s) for s in stored]
        elif isinstance(start, int | np.integer):
            picks.append(Picked(stored[0], at=min(max(int(start), 0), weight.shape[a] - 1)))
        else:
            picks.append(Picked(stored[0], index=jnp.clip(start, 0, weight.shape[a] - 1)))
    return dataclasses.replace(weight, axes=tuple(axes), picks=tuple(picks))


def gathered(weight: Any, indices: Any, params: dict[str, Any], ndim: int) -> Any:
    """The weight that remembers which entries `lax.gather` took.

    Args:
      weight: as it was before.
      indices: integers [..., k].
      params: the equation's parameters.
      ndim: of the result.
    """
    d = params["dimension_numbers"]
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    kept = [a for a in range(len(weight.axes)) if a not in gone]
    origin = dict(zip(d.offset_dims, kept, strict=True))
    outer = [a for a in range(ndim) if a not in origin]
    first = 1 + max((label for p in weight.picks for label in p.labels), default=-1)
    number = {a: first + k for k, a in enumerate(outer)}
    single = [a for a in kept if params["slice_sizes"][a] == 1 < weight.shape[a]]
    own = {a: () if of in single else weight.axes[of] for a, of in origin.items()}
    axes = tuple(own[a] if a in own else ((number[a],),) for a in range(ndim))
    picks = weight.picks
    for a in (*gone, *single):
        stored = sorted({label[0] for label in weight.axes[a]})
        whole = len(stored) == 1 and weight.stored[stored[0]] == weight.shape[a]
        if is_picked(weight.axes[a]):
            picks = forget(picks, weight.axes[a])
        elif whole and a in d.start_index_map and not d.operand_batching_dims:
            index = indices[..., d.start_index_map.index(a)]
            if params["mode"] == lax.GatherScatterMode.CLIP:
                index = jnp.clip(index, 0, weight.shape[a] - 1)
            picks = (*picks, Picked(stored[0], tuple(number.values()), index=index))
        else:
            picks = (*picks, *(Picked(s) for s in stored))
    return dataclasses.replace(weight, axes=axes, picks=picks)


def by_entry(weight: Any, c: Any, x: Any, axes: Sequence[int]) -> tuple[Any, tuple[Any, ...] | None]:
    """The activation of a dot, and for each stored axis that is picked at run time which entry each token goes to.

    Args:
      weight, c: the weight and how the dot's axes are arranged.
      x: the activation as the program has it.
      axes: the contracted stored axes.

    Returns: x [*batch, *picked, *tokens, n] and integers that broadcast to [*picked]; None where nobody knows them.
    """
    pairs = [*zip(c.x_batch, c.w_batch, strict=True), *zip(c.x_contract, c.w_contract, strict=True)]
    shared = {a: weight.axes[w] for a, w in pairs if is_picked(weight.axes[w])}
    stack = [p for p in of_stack(weight.picks, axes) if p.at is None]
    labels = {label for p in stack for label in p.labels}
    place = {ls[0][0]: a for a, ls in shared.items() if len(ls) == 1 and len(ls[0]) == 1 and ls[0][0] in labels}
    mixed = any({label[0] for label in ls} & labels and a not in place.values() for a, ls in shared.items())
    known = all(p.known for p in stack) and not mixed
    batch = [a for a in c.x_batch if a not in shared]
    contracted = [a for a in c.x_contract if a not in shared]
    tokens = [a for a in (*shared, *c.x_free) if a not in place.values()]
    own = [label for label in sorted(labels) if label not in place]
    order = [*place, *own]
    size = {label: p.index.shape[k] for p in stack if p.known for k, label in enumerate(p.labels)}
    x = x.transpose(*batch, *place.values(), *tokens, *contracted)
    lead, then = len(batch) + len(place), len(tokens)
    n = int(np.prod(x.shape[lead + then :]))
    x = x.reshape(*x.shape[:lead], *(1 for _ in own), *x.shape[lead : lead + then], n)
    if not known:
        return x, None
    at = lead + len(own)
    x = jnp.broadcast_to(x, (*x.shape[:lead], *(size[label] for label in own), *x.shape[at:]))

    def spread(p: Picked) -> Any:
        """The index with its axes among those of all picks."""
        where = [order.index(label) for label in p.labels]
        index = p.index.transpose(np.argsort(where))
        return jnp.expand_dims(index, [k for k in range(len(order)) if k not in where])

    return x, tuple(spread(p) for p in stack)


def each_entry(
    statistic: Callable[[Any], Any], x: Any, entries: Sequence[Any], sizes: Sequence[int], batch: int
) -> Any:
    """The statistic of each entry's own tokens, those of the others zeros in their place; stacked on leading axes.

    Args:
      statistic: of x [*batch, *picked, *tokens, n].
      x, entries: see `by_entry`.
      sizes: how many entries each picked axis has.
      batch: the number of batch axes.
    """
    if not sizes:
        return statistic(x)
    if all(e.ndim == 0 for e in entries):  # one entry for all tokens
        return jax.tree.map(
            lambda s: jnp.zeros((*sizes, *s.shape), s.dtype).at[tuple(entries)].set(s, mode="drop"), statistic(x)
        )

    def one(number: Any) -> Any:
        where = [e == k for e, k in zip(entries, jnp.unravel_index(number, tuple(sizes)), strict=True)]
        mine = jnp.broadcast_to(True, jnp.broadcast_shapes(*(w.shape for w in where)))
        for w in where:
            mine = mine & jnp.broadcast_to(w, mine.shape)
        mine = mine.reshape(*(1,) * batch, *mine.shape, *(1,) * (x.ndim - batch - mine.ndim))
        return statistic(jnp.where(jnp.broadcast_to(mine, x.shape), x, jnp.zeros_like(x)))

    made = lax.map(one, jnp.arange(int(np.prod(sizes))))
    return jax.tree.map(lambda s: s.reshape(*sizes, *s.shape[1:]), made)
