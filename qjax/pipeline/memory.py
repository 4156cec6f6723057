"""Quantize a params tree in memory.

qparams[path] = quantize(params[path], plan(path), weight=stats[path])       kept leaves pass through
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import UserError
from qjax.formats import BlockFormat
from qjax.pipeline.encode import compile_ahead, encode_tensor, workers
from qjax.pipeline.report import Report, TensorReport
from qjax.plan import Assignment, Plan, Weight
from qjax.tensor import QTensor, dequantize, is_qtensor, quantize


def quantize_params(
    params: Any, plan: Plan, stats: Mapping[str, Array] | None = None, key: Array | None = None
) -> tuple[Any, Report]:
    """Quantize the weights of a params tree as a plan says.

    Args:
      params: a tree of floats. A leaf named `embedding` has its blocks along its last axis; every other matrix is a
        flax kernel (in, out), or a stack of them, with its blocks along `in`.
      plan: patterns over the leaves' paths ("layers_0/attn/q/kernel"); see `qjax.plan`.
      stats: {path: f32[in]}, the importance of each input of a weight (mean squared activation). Weights that it does
        not name are rounded without.
      key: for formats that draw random numbers; today's need none.

    Returns: the same tree with QTensors in place of the quantized weights, and a Report of every leaf.

    Raises:
      UserError: what `Plan.assign` raises; NaN or Inf in a weight or its importance; importance of another length or
        of no weight. Each names the leaf.
    """
    del key
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    weights = [_weight(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    stats = {} if stats is None else stats
    for path in stats:
        if path not in {w.path for w in weights}:
            raise UserError(f"stats: no weight is called {path!r}; they are called like {weights[0].path!r}")
    out, lines = [], []
    assigned = plan.assign(weights)
    with ThreadPoolExecutor(workers()) as pool:
        compile_ahead(
            pool,
            dict.fromkeys(
                (a.format, np.dtype(leaf.dtype), a.weight.path in stats)
                for (_, leaf), a in zip(leaves, assigned, strict=True)
                if isinstance(a.format, BlockFormat) and not is_qtensor(leaf)
            ),
        )
        for (_, leaf), assignment in zip(leaves, assigned, strict=True):
            q, line = _quantize_leaf(pool, leaf, assignment, stats.get(assignment.weight.path))
            out.append(q)
            lines.append(line)
    return jax.tree_util.tree_unflatten(tree, out), Report(tuple(lines))


def contracted_axis(path: str, ndim: int) -> int:
    """The axis along which a weight is contracted, by its name: -1 for embeddings (vocab, dim), -2 for kernels."""
    return -1 if ndim < 2 or path.rsplit("/", 1)[-1] == "embedding" else -2


def _weight(path: str, leaf: Any) -> Weight:
    shape = list(leaf.shape)
    if shape:
        shape.append(shape.pop(contracted_axis(path, len(shape))))
    return Weight(path, tuple(shape))


def _quantize_leaf(
    pool: ThreadPoolExecutor, leaf: Any, assignment: Assignment, importance: Array | None
) -> tuple[Any, TensorReport]:
    w, fmt = assignment.weight, assignment.format
    if fmt is None:
        name = leaf.format.name if is_qtensor(leaf) else jnp.dtype(leaf.dtype).name
        return leaf, TensorReport(w.path, w.shape, name, leaf.nbytes, kept=assignment.reason)
    if is_qtensor(leaf):
        raise UserError(f"{w}: already quantized to {leaf.format.name}; dequantize it first, or keep it")
    axis = contracted_axis(w.path, leaf.ndim)
    if isinstance(fmt, BlockFormat):
        rows = np.moveaxis(np.asarray(leaf), axis, -1)
        encoding = encode_tensor(pool, str(w), rows, fmt, None if importance is None else np.asarray(importance))
        raw, error = encoding.result()
        packed = raw.reshape(*rows.shape[:-1], rows.shape[-1] // fmt.block, fmt.block_bytes)
        q = QTensor({"blocks": jnp.asarray(packed)}, fmt, axis)
    else:
        try:
            q = quantize(leaf, fmt, axis=axis, weight=importance)
        except UserError as e:
            raise UserError(f"{w}: {e}") from None
        error = float(np.sqrt(np.asarray(_square_ratio(leaf, q))))
        if not np.isfinite(error):
            raise UserError(f"{w}: its values are too large for {fmt.name}")
    return q, TensorReport(w.path, w.shape, fmt.name, q.nbytes, error)


@jax.jit
def _square_ratio(leaf: Array, q: QTensor) -> Array:
    w = leaf.astype(jnp.float32)
    d = w - dequantize(q)
    # Scaled by absmax, so that the squares of large weights stay finite; 0 / tiny for all zeros.
    top = jnp.maximum(jnp.max(jnp.abs(w)), 1e-30)
    return jnp.sum((d / top) ** 2) / jnp.maximum(jnp.sum((w / top) ** 2), 1e-30)
