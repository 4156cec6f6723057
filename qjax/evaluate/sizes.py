"""What a model weighs: bytes, bits per quantized weight, bits per weight of the whole model, and a row per tensor.

    block bits = 8 bytes(quantized leaves) / weights(quantized leaves)        what a format's name promises
    whole bits = 8 bytes(all leaves) / weights(all leaves)                    what the memory or the file sees

All counts come from the leaves: codes, scales, padding. Floats count at the width they are held in.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.storage import stored_bytes
from qjax.tensor import dequantize, is_qtensor
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A params tree's size. `block_bits` is None where nothing is quantized."""

    parameters: int
    bytes: int
    whole_bits: float
    quantized_parameters: int
    quantized_bytes: int
    block_bits: float | None


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One tensor of a model; the errors are None without a reference.

    `relative_rmse` is |w_hat - w| / |w| in the Frobenius norm, `sqnr_db` the same as -20 log10 (infinite where equal).
    """

    path: str
    format: str
    shape: tuple[int, ...]
    bits: float
    bytes: int
    relative_rmse: float | None = None
    sqnr_db: float | None = None


def named_leaves(params: Any) -> dict[str, Any]:
    """{"layers_0/attn/q/kernel": array or QTensor}, in the tree's order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    return {"/".join(_key(entry) for entry in path): leaf for path, leaf in flat}


def sizes(params: Any) -> Sizes:
    """Count a params tree of arrays and QTensors.

    >>> import jax.numpy as jnp
    >>> from qjax.tensor import quantize
    >>> s = sizes({"w": quantize(jnp.ones((2, 32)), "Q8_0"), "gain": jnp.ones(32)})
    >>> s.block_bits, s.whole_bits
    (8.5, 16.333333333333332)
    """
    leaves = named_leaves(params).values()
    return counted((leaf.size, _bytes(leaf), is_qtensor(leaf)) for leaf in leaves)


def counted(tensors: Iterable[tuple[int, int, bool]]) -> Sizes:
    """The sum of tensors: (weights, bytes, whether it is quantized) of each."""
    rows = list(tensors)
    packed = [(size, nbytes) for size, nbytes, is_packed in rows if is_packed]
    count, total = sum(row[0] for row in rows), sum(row[1] for row in rows)
    if count == 0:
        raise UserError("the model has no parameters")
    packed_count, packed_total = sum(row[0] for row in packed), sum(row[1] for row in packed)
    return Sizes(
        parameters=count,
        bytes=total,
        whole_bits=8 * total / count,
        quantized_parameters=packed_count,
        quantized_bytes=packed_total,
        block_bits=8 * packed_total / packed_count if packed else None,
    )


def tensor_rows(params: Any, reference: Any = None) -> list[TensorRow]:
    """A row per tensor, in the tree's order.

    Args:
      params: a tree of arrays and QTensors.
      reference: the float tree it was made from, for the errors; one tensor of it is looked at at a time.

    Raises:
      UserError: a tensor the reference lacks or has in another shape.
    """
    floats: Mapping[str, Any] = {} if reference is None else named_leaves(reference)
    rows = []
    for path, leaf in named_leaves(params).items():
        rmse = db = None
        if reference is not None:
            if path not in floats or tuple(floats[path].shape) != tuple(leaf.shape):
                found = f"has shape {tuple(floats[path].shape)}" if path in floats else "is missing"
                raise UserError(f"{path}: expected {tuple(leaf.shape)}, but in the reference it {found}")
            rmse = 0.0 if is_key(leaf) else relative_rmse(leaf, floats[path])
            db = -20 * math.log10(rmse) if 0 < rmse < math.inf else math.inf if rmse == 0 else -math.inf
        name = leaf.format.name if is_qtensor(leaf) else str(leaf.dtype)
        rows.append(
            TensorRow(path, name, tuple(leaf.shape), 8 * _bytes(leaf) / max(leaf.size, 1), _bytes(leaf), rmse, db)
        )
    return rows


def by_layer(rows: Iterable[TensorRow]) -> list[dict[str, Any]]:
    """Plain rows of tensors, with the layer each is in and what kind of weight it is there.

    >>> by_layer([TensorRow("layers_3/attn/q/kernel", "Q4_0", (64, 64), 4.5, 2304, 0.08)])[0]["kind"]
    'attn q'
    """
    made = []
    for row in rows:
        inside = re.fullmatch(r".*?(\d+)/(.+?)(?:/kernel)?", row.path)
        layer, kind = (int(inside[1]), inside[2]) if inside else (None, row.path.split("/")[0])
        error = None if row.relative_rmse is None else float(f"{row.relative_rmse:.4g}")
        made.append({"name": row.path, "layer": layer, "kind": kind.replace("/", " "), "format": row.format,
                     "shape": " x ".join(map(str, row.shape)), "bits": round(row.bits, 4), "bytes": row.bytes,
                     "relative_rmse": error})  # fmt: skip
    return made


def relative_rmse(leaf: Any, reference: Any) -> float:
    """|w_hat - w| / |w| of a QTensor or array against the floats it stands for; 0 where the two are equal."""
    error = norm = 0.0
    for some in _in_rows(leaf, reference):
        top, *sums = (float(x) for x in _squares(*some))
        error, norm = error + sums[0] * top * top, norm + sums[1] * top * top
    if error == 0:
        return 0.0
    return math.sqrt(error / norm) if norm else math.inf


_AT_ONCE = 1 << 24  # weights of a large matrix, decoded to be compared


def _in_rows(leaf: Any, reference: Any) -> Iterator[tuple[Array, Array]]:
    """Both in float32: some rows at a time of a large matrix whose rows are stored one by one, else as a whole."""
    by_rows = is_qtensor(leaf) and leaf.ndim == 2 and not leaf.applied and leaf.format.rows == 1
    if leaf.size <= _AT_ONCE or not by_rows:
        yield as_float(leaf), as_float(reference)
        return
    step = max(1, _AT_ONCE // leaf.shape[leaf.axis])
    for at in range(0, leaf.size // leaf.shape[leaf.axis], step):
        rows = slice(at, at + step)
        some = dataclasses.replace(leaf, leaves=jax.tree.map(lambda a, rows=rows: a[rows], leaf.leaves))
        yield dequantize(some), as_float(reference[rows] if leaf.axis == -1 else reference[:, rows])


def is_key(leaf: Any) -> bool:
    """Whether a leaf holds keys of random numbers, as the states of flax nnx do."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def as_float(leaf: Any) -> Array:
    """float32 values of an array or QTensor."""
    return dequantize(leaf) if is_qtensor(leaf) else jnp.asarray(leaf).astype(jnp.float32)


@jax.jit
def _squares(w_hat: Array, w: Array) -> tuple[Array, Array, Array]:
    """The largest |w|, and the sums of squares in units of it: of w_hat - w, and of w."""
    top = jnp.maximum(jnp.max(jnp.abs(w), initial=0.0), 1e-30)  # so that the squares of large weights stay finite
    return top, jnp.sum(jnp.square((w_hat - w) / top)), jnp.sum(jnp.square(w / top))


def _bytes(leaf: Any) -> int:
    return leaf.nbytes if is_qtensor(leaf) or is_key(leaf) else stored_bytes(leaf)


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))
