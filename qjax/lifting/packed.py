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
from qjax.lifting.weight import Dense
from qjax.tensor import QTensor


def quantized_axis(q: QTensor) -> int:
    """The quantized axis, counted from the front."""
    return q.ndim + q.axis


def leads(q: QTensor) -> list[int]:
    """The other axes, in the order in which every leaf has them first."""
    return [a for a in range(q.ndim) if a != quantized_axis(q)]


def _each(q: QTensor, fn: Callable[[Any], Any], axis: int) -> QTensor:
    """The QTensor of fn(leaf) whose quantized axis is `axis`, counted from the end."""
    if q.applied:
        raise Dense(f"is rearranged under {type(q.applied[0]).__name__}, which knows whole matrices only")
    return dataclasses.replace(q, leaves=jax.tree.map(fn, q.leaves), axis=axis)


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor:
    """`lax.transpose`: leaves move only if the order of the axes that are not quantized changes."""
    order = leads(q)
    moved = [order.index(a) for a in permutation if a != quantized_axis(q)]
    axis = list(permutation).index(quantized_axis(q)) - q.ndim
    if moved == sorted(moved):
        return dataclasses.replace(q, axis=axis)
    return _each(q, lambda leaf: leaf.transpose(*moved, *range(len(moved), leaf.ndim)), axis)


def reshape(q: QTensor, shape: Sequence[int]) -> QTensor:
    """`lax.reshape` where the quantized axis stays whole, with as many weights before it as before."""
    n, before = q.shape[q.axis], math.prod(q.shape[: quantized_axis(q)])
    for at, size in enumerate(shape):
        if size == n and math.prod(shape[:at]) == before:
            break
    else:
        raise Dense(f"to {list(shape)} splits or merges the quantized axis")
    rest = (*shape[:at], *shape[at + 1 :])
    return _each(q, lambda leaf: leaf.reshape(*rest, *leaf.shape[q.ndim - 1 :]), at - len(shape))


def squeeze(q: QTensor, dimensions: Sequence[int]) -> QTensor:
    """`lax.squeeze` of axes that are not quantized."""
    if quantized_axis(q) in dimensions:
        raise Dense("removes the quantized axis")
    return reshape(q, [size for a, size in enumerate(q.shape) if a not in dimensions])


def static_slice(
    q: QTensor, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None = None
) -> QTensor:
    """`lax.slice`; along the quantized axis of a ggml type in whole blocks, of another format not at all."""
    cuts = [slice(*cut) for cut in zip(start, limit, strides or (1,) * q.ndim, strict=True)]
    at, n, block = quantized_axis(q), q.shape[q.axis], q.format.block
    along = cuts.pop(at)
    if along == slice(0, n, 1):
        return _each(q, lambda leaf: leaf[tuple(cuts)], q.axis)
    if not isinstance(q.format, BlockFormat) or along.start % block or along.stop % block or along.step != 1:
        raise Dense(f"[{along.start}:{along.stop}:{along.step}] cuts the quantized axis off block boundaries")
    return _each(q, lambda leaf: leaf[(*cuts, slice(along.start // block, along.stop // block))], q.axis)


def dynamic_slice(q: QTensor, start: Sequence[Any], sizes: Sequence[int]) -> QTensor:
    """`lax.dynamic_slice` with the quantized axis whole."""
    if sizes[quantized_axis(q)] != q.shape[q.axis]:
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
    at, lead = quantized_axis(q), leads(q)
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


def spec(q: QTensor, logical: Sequence[Any]) -> QTensor:
    """Partition specs of the leaves from the spec of the logical shape.

    Raises:
      Dense: the quantized axis is sharded and the format is no ggml type.
    """
    entries = (*logical, *(None,) * (q.ndim - len(logical)))
    along = entries[quantized_axis(q)]
    if along is not None and not isinstance(q.format, BlockFormat):
        raise Dense("shards the quantized axis")
    lead = [entries[a] for a in leads(q)]
    return _each(q, lambda leaf: jax.sharding.PartitionSpec(*lead, *([along] if along is not None else [])), q.axis)
