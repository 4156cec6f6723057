"""Rows looked up in a weight: a gather or dynamic slice that takes whole vectors, as embeddings do.

Looked-up vectors are activations: they are decoded at once, and nothing else is. A gather of matrices (experts, layers)
picks weights instead and is a matter of `layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.lifting import packed
from qjax.lifting.jax_names import bind
from qjax.lifting.weight import Weight
from qjax.tensor import QTensor, dequantize


def feature_axis(eqn: Any, weight: Weight) -> int | None:
    """The weight's present axis that looked-up vectors run along; None if the equation looks up no vectors."""
    sizes, shape = eqn.params["slice_sizes"], weight.shape
    whole = [a for a, size in enumerate(sizes) if size == shape[a] > 1]
    vectors = len(whole) == 1 and all(size == 1 for a, size in enumerate(sizes) if a != whole[0])
    return whole[0] if vectors and len(shape) > 1 else None


def row_indices(eqn: Any, values: Sequence[Any], axis: int) -> Any:
    """The integers that choose the rows: [...], or [..., k] where k axes are indexed at once."""
    if eqn.primitive.name == "dynamic_slice":
        starts = [s for a, s in enumerate(values[1:]) if a != axis and values[0].shape[a] > 1]
        return jnp.asarray(starts[0]) if len(starts) == 1 else jnp.stack([jnp.asarray(s) for s in starts])
    which = [k for k, a in enumerate(eqn.params["dimension_numbers"].start_index_map) if a != axis]
    return values[1][..., which[0]] if len(which) == 1 else values[1][..., jnp.array(which, jnp.int32)]


def rows(eqn: Any, values: Sequence[Any], array: Any) -> Any:
    """The looked-up vectors, decoded; `array` is the weight's value, dense or packed.

    Raises:
      Dense: the vectors do not run along the quantized axis.
    """
    if not isinstance(array, QTensor):
        return bind(eqn, [array, *values[1:]])[0]
    dtype = eqn.outvars[0].aval.dtype
    if eqn.primitive.name == "dynamic_slice":
        return dequantize(packed.dynamic_slice(array, values[1:], eqn.params["slice_sizes"])).astype(dtype)
    found = dequantize(packed.gather(array, values[1], eqn.params)).astype(dtype)
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return found
    fill = eqn.params["fill_value"]
    return jnp.where(_in_range(eqn, values[1], array.shape), found, jnp.array(jnp.nan if fill is None else fill, dtype))


def _in_range(eqn: Any, indices: Any, shape: tuple[int, ...]) -> Any:
    """Which looked-up vectors exist, broadcastable against them."""
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    last = jnp.array([shape[a] - sizes[a] for a in d.start_index_map], indices.dtype)
    last = last.reshape((1,) * (indices.ndim - 1) + (-1,))
    valid = ((indices >= jnp.zeros_like(last)) & (indices <= last)).all(-1)
    return jnp.expand_dims(valid, d.offset_dims)
