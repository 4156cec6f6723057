"""Encode one large tensor on all cores, in pieces of one fixed shape.

    rows (out, in)  ->  pieces [CHUNK / block, block]  ->  encode each  ->  the tensor's bytes, in order

ggml's blocks do not know of each other, so a tensor is a list of blocks, cut into pieces of CHUNK weights: small enough
for a core's cache, large enough to hide the call, and always of the same shape, so that every format is compiled once
whatever the model. A thread a core calls the compiled function; JAX lets go of Python's lock meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import UserError
from qjax.formats import BlockFormat, Format
from qjax.tensor import is_qtensor

CHUNK = 1 << 16
_AT_ONCE = 1 << 24  # values looked through
_CHUNK_DEVICE = 1 << 22  # accelerators want more to do at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
    """A tensor being encoded. `result()` waits for it."""

    name: str
    format: Format
    out: np.ndarray
    pieces: tuple[Future[Any], ...]

    def result(self) -> tuple[np.ndarray, float]:
        """The tensor's bytes u8[nbytes], and its relative root mean square error.

        Raises:
          UserError: NaN or Inf among the weights, or values beyond what the format's scales can hold.
        """
        sums = np.asarray([piece.result() for piece in self.pieces], np.float64).sum(axis=0)
        bad, square, error = sums.tolist()
        if bad:
            raise broken_weights(self.name, int(bad))
        if not np.isfinite(error):
            raise UserError(f"{self.name}: its values are too large for {self.format.name}")
        return self.out, (error / square) ** 0.5 if square else 0.0


def broken_weights(name: str, count: int) -> UserError:
    """What to raise for a tensor with NaN or Inf in it."""
    return UserError(f"{name}: {count} of its weights are NaN or infinite; the model is broken")


def broken(w: Any) -> int:
    """How many of an array's values are NaN or infinite, looked at a part at a time."""
    if w.size <= _AT_ONCE or w.ndim < 2:
        return int(_broken(w))
    step = max(1, _AT_ONCE * len(w) // w.size)
    return sum(int(_broken(w[at : at + step])) for at in range(0, len(w), step))


@jax.jit
def _broken(w: Array) -> Array:
    return jnp.sum(~jnp.isfinite(w))


def check_finite(params: Any, prefix: str = "") -> None:
    """Raise UserError where a float array of a params tree has NaN or Inf; packed weights and integers pass."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        if not is_qtensor(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
            bad = broken(leaf)
            if bad:
                raise broken_weights(prefix + jax.tree_util.keystr(path, simple=True, separator="/"), bad)


def encode_tensor(
    pool: ThreadPoolExecutor, name: str, w: np.ndarray, fmt: Format, importance: np.ndarray | None = None
) -> Encoding:
    """Begin to encode a tensor.

    Args:
      pool: the threads; `workers()` of them use the machine.
      name: for messages.
      w: floats (out, in), possibly a view of a mapped file.
      fmt: a ggml type whose block divides `in`.
      importance: f32[in], the importance of each column; of a stack f32[in] or f32[experts, in].
    """
    if not isinstance(fmt, BlockFormat):
        raise UserError(f"{name}: {fmt.name} is no ggml type, and a GGUF file holds nothing else")
    columns = w.shape[-1]
    if importance is not None:
        importance = np.asarray(importance, np.float32)
        if importance.shape not in ((columns,), (*w.shape[:-2], columns)):
            raise UserError(f"{name}: importance of shape {importance.shape} for weights of shape {w.shape}")
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise UserError(f"{name}: its importance has NaN, infinite or negative values")
    blocks = w.reshape(-1, fmt.block)
    step = _step(fmt)
    weights = None if importance is None else importance.reshape(-1, columns // fmt.block, fmt.block)
    a_row, a_matrix = columns // fmt.block, len(blocks) // max(len(w), 1) if w.ndim > 2 else len(blocks)
    out = np.empty((len(blocks), fmt.block_bytes), np.uint8)

    def piece(start: int) -> np.ndarray:
        x = blocks[start : start + step]
        count = len(x)
        if count < step:
            x = np.concatenate([x, np.zeros((step - count, fmt.block), x.dtype)])
        at = np.arange(start, start + step)
        v = None if weights is None else weights[at // a_matrix % len(weights), at % a_row]
        packed, sums = _encode(x, v, fmt)
        out[start : start + count] = np.asarray(packed).reshape(step, fmt.block_bytes)[:count]
        return np.asarray(sums)

    pieces = tuple(pool.submit(piece, start) for start in range(0, len(blocks), step))
    return Encoding(name, fmt, out.reshape(-1), pieces)


def compile_ahead(pool: ThreadPoolExecutor, kinds: Iterable[tuple[Format, Any, bool]]) -> None:
    """Compile for every (format, dtype of the weights, with importance) at once, a thread each.

    Without it all threads would meet at the first piece of a format and compile the same thing.
    """

    def one(kind: tuple[Format, Any, bool]) -> None:
        fmt, dtype, weighted = kind
        x = np.zeros((_step(fmt), fmt.block), dtype)
        jax.block_until_ready(_encode(x, np.ones(x.shape, np.float32) if weighted else None, fmt))

    list(pool.map(one, kinds))


def _step(fmt: Format) -> int:
    """Blocks of a piece."""
    return max(1, (CHUNK if jax.default_backend() == "cpu" else _CHUNK_DEVICE) // fmt.block)


@partial(jax.jit, static_argnames="fmt")
def _encode(x: Array, weight: Array | None, fmt: BlockFormat) -> tuple[Array, Array]:
    """Blocks of a piece, and [weights that are not finite, sum w^2, sum (w - w_hat)^2]."""
    w = x.astype(jnp.float32)
    scales, codes = fmt.encode(w, weight)
    error = w - fmt.decode(scales, codes)
    sums = [jnp.sum(~jnp.isfinite(w), dtype=jnp.float32), jnp.sum(w * w), jnp.sum(error * error)]
    return fmt.pack(scales, codes)["blocks"], jnp.stack(sums)
