"""Arrangements of a QTensor that leave its codes alone: transpose, reshape, slice, gather on the axes that are not
quantized, and slices of whole blocks. Each returns a QTensor or raises `Dense` with the reason why it cannot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.protocol import BlockFormat
from qjax.kernels import Prepacked
from qjax.lifting.weight import Dense
from qjax.tensor import QTensor


def quantized_axes(q: QTensor) -> range:
    """The axes that the blocks run along, counted from the front: one, or adjacent ones that they merge."""
    last = q.ndim + q.axis
    return range(last + 1 - max(1, len(q.split)), last + 1)


def leads(q: QTensor) -> list[int]:
    """The other axes, in the order in which every leaf has them first."""
    return [a for a in range(q.ndim) if a not in quantized_axes(q)]


def _each(q: QTensor, fn: Callable[[Any], Any], axis: int, **changes: Any) -> QTensor:
    """The QTensor of fn(leaf) whose quantized axis is `axis`, counted from the end."""
    if q.applied:
        raise Dense(f"is rearranged under {type(q.applied[0]).__name__}, which knows whole matrices only")
    if isinstance(q.format, Prepacked):
        raise Dense(f"is rearranged in the layout of a kernel, {q.format.layout.name}: leave it out of qjax.prepack")
    return dataclasses.replace(q, leaves=jax.tree.map(fn, q.leaves), axis=axis, **changes)


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor:
    """`lax.transpose`: leaves move only if the order of the axes that are not quantized changes."""
    order, own = leads(q), quantized_axes(q)
    moved = [order.index(a) for a in permutation if a not in own]
    first = list(permutation).index(own[0])
    if tuple(permutation[first : first + len(own)]) != tuple(own):
        raise Dense(f"to {[q.shape[a] for a in permutation]} parts the axes that the blocks run along")
    axis = first + len(own) - 1 - q.ndim
    if moved == sorted(moved):
        return dataclasses.replace(q, axis=axis)
    return _each(q, lambda leaf: leaf.transpose(*moved, *range(len(moved), leaf.ndim)), axis)


def reshape(q: QTensor, shape: Sequence[int]) -> QTensor:
    """`lax.reshape` where the quantized axis stays whole, or is split or merged by itself, with as many weights before
    it as before.
    """
    own = quantized_axes(q)
    n, before = math.prod(q.shape[a] for a in own), math.prod(q.shape[: own[0]])
    runs = [
        (at, stop) for at in range(len(shape)) for stop in range(at + 1, len(shape) + 1)
        if math.prod(shape[:at]) == before and math.prod(shape[at:stop]) == n
    ]  # fmt: skip
    if not runs:
        raise Dense(f"to {list(shape)} splits or merges the quantized axis")
    at, stop = min(runs, key=lambda run: run[1] - run[0])
    rest, split = (*shape[:at], *shape[stop:]), tuple(shape[at:stop]) if stop > at + 1 else ()
    lead = len(leads(q))
    return _each(q, lambda leaf: leaf.reshape(*rest, *leaf.shape[lead:]), stop - 1 - len(shape), split=split)


def squeeze(q: QTensor, dimensions: Sequence[int]) -> QTensor:
    """`lax.squeeze` of axes that are not quantized."""
    if set(quantized_axes(q)) <= set(dimensions):
        raise Dense("removes the quantized axis")
    return reshape(q, [size for a, size in enumerate(q.shape) if a not in dimensions])


def static_slice(
    q: QTensor, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None = None
) -> QTensor:
    """`lax.slice`; along the quantized axis of a ggml type in whole blocks, of another format not at all."""
    cuts = [slice(*cut) for cut in zip(start, limit, strides or (1,) * q.ndim, strict=True)]
    own, block = quantized_axes(q), q.format.block
    along, cuts = [cuts[a] for a in own], [cuts[a] for a in leads(q)]
    if along == [slice(0, q.shape[a], 1) for a in own]:
        return _each(q, lambda leaf: leaf[tuple(cuts)], q.axis)
    if q.split:
        raise Dense("cuts axes that the blocks run along together")
    return _blocks(q, cuts, along[0], block)


def _blocks(q: QTensor, cuts: Sequence[slice], along: slice, block: int) -> QTensor:
    """A slice of whole blocks of a ggml type, and of the other axes."""
    if not _in_blocks(q) or along.start % block or along.stop % block or along.step != 1:
        raise Dense(f"[{along.start}:{along.stop}:{along.step}] cuts the quantized axis off block boundaries")
    return _each(q, lambda leaf: leaf[(*cuts, slice(along.start // block, along.stop // block))], q.axis)


def dynamic_slice(q: QTensor, start: Sequence[Any], sizes: Sequence[int]) -> QTensor:
    """`lax.dynamic_slice` with the quantized axis whole."""
    if any(sizes[a] != q.shape[a] for a in quantized_axes(q)):
        raise Dense("cuts the quantized axis at a place known only at run time")
    lead = leads(q)

    def cut(leaf: Any) -> Any:
        rest = leaf.shape[len(lead) :]
        zero = [jnp.zeros_like(s) for s in start[:1]] * len(rest)
        return lax.dynamic_slice(leaf, [*(start[a] for a in lead), *zero], [*(sizes[a] for a in lead), *rest])

    return _each(q, cut, q.axis)


def gather(q: QTensor, indices: Any, params: dict[str, Any]) -> QTensor:
    """`lax.gather` with the quantized axis whole. Out-of-range indices are clamped where they would give a fill value.

    Args:
      q: the operand.
      indices: integers [..., k].
      params: the equation's parameters.
    """
    d, sizes = params["dimension_numbers"], params["slice_sizes"]
    if _takes_matrices(q, d, sizes, indices.ndim):
        return jax.tree.map(lambda leaf: jnp.take(leaf, indices[..., 0], axis=0, mode="clip"), q)
    if q.split:
        raise Dense("takes parts of a weight whose blocks run along several axes: index its first axis by a number")
    (at,), lead = quantized_axes(q), leads(q)
    if sizes[at] != q.shape[q.axis] or at in d.collapsed_slice_dims or at in d.operand_batching_dims:
        raise Dense("takes single weights along the quantized axis")
    kept = [a for a in range(q.ndim) if a not in d.collapsed_slice_dims and a not in d.operand_batching_dims]
    position = dict(zip(kept, d.offset_dims, strict=True))  # of each kept axis in the output
    ndim = indices.ndim - 1 + len(kept)
    # A whole axis can only start at 0, so the index along the quantized one says nothing.
    used = [k for k, a in enumerate(d.start_index_map) if a != at]
    mode = params["mode"]

    def rows(leaf: Any) -> Any:
        rest = leaf.ndim - len(lead)
        numbers = lax.GatherDimensionNumbers(
            offset_dims=(
                *(position[a] - (position[a] > position[at]) for a in kept if a != at),
                *range(ndim - 1, ndim - 1 + rest),
            ),
            collapsed_slice_dims=tuple(lead.index(a) for a in d.collapsed_slice_dims),
            start_index_map=tuple(lead.index(d.start_index_map[k]) for k in used),
            operand_batching_dims=tuple(lead.index(a) for a in d.operand_batching_dims),
            start_indices_batching_dims=d.start_indices_batching_dims,
        )
        return lax.gather(
            leaf,
            indices[..., jnp.array(used, jnp.int32)] if len(used) < indices.shape[-1] else indices,
            numbers,
            (*(sizes[a] for a in lead), *leaf.shape[len(lead) :]),
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=lax.GatherScatterMode.CLIP if mode == lax.GatherScatterMode.FILL_OR_DROP else mode,
        )

    return _each(q, rows, position[at] - ndim)


def _takes_matrices(q: QTensor, d: Any, sizes: Sequence[int], ndim: int) -> bool:
    """Whether a gather takes whole entries of a stack's first axis, which comes first in every leaf: in a kernel's
    layout and behind changes of variables, too."""
    return (
        q.ndim > 2
        and q.axis in (-1, -2)
        and not q.split
        and tuple(sizes) == (1, *q.shape[1:])
        and (d.collapsed_slice_dims, d.start_index_map) == ((0,), (0,))
        and not d.operand_batching_dims
        and tuple(d.offset_dims) == tuple(range(ndim - 1, ndim - 2 + q.ndim))
    )


def _in_blocks(q: QTensor) -> bool:
    return isinstance(q.format, BlockFormat)


def spec(q: QTensor, logical: Sequence[Any]) -> QTensor:
    """Partition specs of the leaves from the spec of the logical shape.

    Raises:
      Dense: the quantized axis is sharded and the format is no ggml type.
    """
    entries = (*logical, *(None,) * (q.ndim - len(logical)))
    *others, along = (entries[a] for a in quantized_axes(q))
    if any(one is not None for one in others) or (along is not None and (q.split or not _in_blocks(q))):
        raise Dense("shards the quantized axis")
    lead = [entries[a] for a in leads(q)]
    return _each(q, lambda leaf: jax.sharding.PartitionSpec(*lead, *([along] if along is not None else [])), q.axis)
