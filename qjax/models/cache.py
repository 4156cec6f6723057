"""The key/value cache: what attention keeps of the positions so far, as floats or in a format.

    entry[b kv, capacity, d]     an array, or a QTensor whose blocks run along d: each position is rounded as it comes

A packed entry is read by decoding it, one layer at a time. Rounding a head's numbers after the position embedding, as
here: KVQuant, arXiv:2401.18079, section 3, has what else may be done.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.models.config import DecoderConfig
from qjax.models.linear_attention import empty_memory
from qjax.tensor import QTensor, dequantize, is_qtensor, quantize
from qjax.typing import Array, Float

Cache = dict[str, Any]
"""{"length": i32, how many positions are filled; "layers_3": {"k", "v"}, an entry each; of a layer of linear attention
{"conv", "state"}, floats however long the text is}."""
Entry = Any  # Array | QTensor; Any, because shapes pass through here too


def empty_cache(
    config: DecoderConfig, batch: int, capacity: int, dtype: Any = jnp.float32, format: str | Format | None = None
) -> Cache:
    """A key/value cache for `capacity` positions of `batch` texts.

    Args:
      config: the decoder.
      batch, capacity: how many texts and positions.
      dtype: of the floats.
      format: in which keys and values are packed, instead; its blocks must divide a head.

    Raises:
      UserError: a format that the heads cannot be packed in.
    """

    def layer(i: int) -> dict[str, Entry]:
        if config.linear is not None and config.is_linear(i):
            return empty_memory(config.linear, batch, dtype)
        c = config.of_layer(i)
        shapes = {name: (batch * c.kv_heads, capacity, n) for name, n in (("k", c.head_dim), ("v", c.value_size))}
        if format is None:
            return {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
        return {name: _packed_zeros(get_format(format), shape) for name, shape in shapes.items()}

    return {"length": jnp.int32(0)} | {f"layers_{i}": layer(i) for i in range(config.layers)}


def _packed_zeros(format: Format, shape: tuple[int, int, int]) -> QTensor:
    size = shape[-1]
    if format.rows != 1 or (format.block and size % format.block):
        raise UserError(
            f"keys and values cannot be kept in {format.name}: a head has {size} numbers, rounded by themselves, and a "
            f"block of it {format.block or 'a whole matrix'}; Q8_0 takes multiples of 32"
        )
    one = quantize(jnp.zeros((1, 1, size)), format)
    leaves = jax.tree.map(lambda leaf: jnp.tile(leaf, (*shape[:2], *(1,) * (leaf.ndim - 2))), one.leaves)
    return QTensor(leaves, format)


def appended(entry: Entry, y: Float[Array, "n t d"], start: Any) -> Entry:
    """The entry with `y` at the positions from `start` on."""
    if not is_qtensor(entry):
        return lax.dynamic_update_slice_in_dim(entry, y.astype(entry.dtype), start, axis=1)
    new = quantize(y, entry.format)
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, axis=1), entry, new)


def remembered(entry: Entry) -> Float[Array, "n s d"]:
    """What attention reads of an entry."""
    return dequantize(entry) if is_qtensor(entry) else entry
