"""Packed weights brought into the layouts that kernels read, once, at load."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.kernels import PLATFORMS, Call, choice
from qjax.kernels.dispatch import running_on
from qjax.kernels.kernel import Implementation, Platform
from qjax.kernels.prepacked import Prepacked, bare
from qjax.tensor import QTensor, is_qtensor


def prepack(
    tree: Any, rows: int = 1, dtype: Any = jnp.bfloat16, platform: Platform | None = None,
    implementation: Implementation = "auto",
) -> Any:  # fmt: skip
    """The same weights, each as the kernel that will multiply with it reads them.

    Args:
      tree: QTensors among other leaves. Only whole matrices can be used afterwards, no rows looked up in them: leave an
        embedding out.
      rows: of the activations that the weights will meet.
      dtype: theirs.
      platform: where; None: where JAX runs.
      implementation: as `qjax.dot` takes it.

    Returns: the tree. A weight whose kernel reads it as it is, that is prepacked already, or that rounds its inputs (no
      kernel multiplies with it) stays as it is; `dequantize` gives the same bits of each, `dot` the same products.
    """
    where = running_on() if platform is None else platform

    def one(q: Any) -> Any:
        if not is_qtensor(q) or isinstance(q.format, Prepacked) or q.ndim < 2 or where not in PLATFORMS:
            return q
        if q.rounds_inputs:
            return q
        *_, out, n = q.format.shape(q.leaves)
        kernel, _ = choice(Call(bare(q.format), (out, n), rows, jnp.dtype(dtype)), where, implementation)
        return q if kernel is None or kernel.layout is None else _laid_out(q, Prepacked(q.format, kernel.layout))

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


def _laid_out(q: QTensor, format: Prepacked) -> QTensor:
    packed = jax.jit(format.layout.prepack, static_argnums=0)(q.format, q.leaves)
    return dataclasses.replace(q, leaves={"packed": packed}, format=format)
