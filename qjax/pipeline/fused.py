"""Channel scales found by a search and folded into the decoder: AWQ and SmoothQuant in a plain GGUF or HF file.

    for every edge producer -> sinks:    s = search([W_1; W_2; ...], stats of their shared input)
                                         W_i <- W_i diag(s),  producer <- producer / s          models/graph.py, fuse.py

The sinks of an edge share one s, as q, k and v share their norm. The model's output does not change; what changes is
how much a rounding that follows loses. Sources: AWQ, arXiv:2306.00978, section 3.2; SmoothQuant, arXiv:2211.10438,
section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.calibrate.observe import observe
from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.models.fuse import fuse_scale
from qjax.models.graph import Edge, edges
from qjax.models.model import Model, forward
from qjax.pipeline.windows import Calibration
from qjax.reparam import Reparam, Site
from qjax.reparam.scale import Scaled
from qjax.stats import Stats
from qjax.tensor import is_qtensor
from qjax.typing import Array


def fused_scales(
    model: Model,
    search: Reparam,
    format: str | Format,
    calibration: Calibration,
    *,
    only: Sequence[str] = (),
    progress: Callable[[int], None] = lambda done: None,
) -> Model:
    """The same model with searched channel scales folded into its weights.

    Args:
      model: float weights.
      search: a channel scaling: smooth(), awq_scale(), rescale().
      format: the grid the weights are going to; awq_scale searches with it.
      calibration: the text that activations are observed on, in the float model.
      only: edges by the end of their producers' names ("attn_norm", "mlp_norm", "up", "v", "final_norm"); all that the
        architecture allows by default.
      progress: called with the number of batches observed.

    Returns: a model with the same logits (float32) and tokenizer.

    Raises:
      UserError: a reparametrization that is no channel scaling; an edge name that no edge has; what `observe` and
        `fuse_scale` raise.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(f"{name} is packed ({leaf.format.name}): fuse into the float weights, then quantize")
    chosen = tuple(e for e in edges(model.config) if not only or _producer(e) in only)
    for name in only:
        if name not in {_producer(e) for e in chosen}:
            names = ", ".join(dict.fromkeys(_producer(e) for e in edges(model.config)))
            raise UserError(f"no edge of this decoder begins at {name!r}; they begin at {names}")
    kinds = tuple(sorted("H" if kind == "h" else kind for kind in search.requires))
    stats = _observed(model, kinds, calibration, progress) if kinds else {}
    params: Any = model.params
    for edge in chosen:
        kernels = [_kernel(model.params, path).swapaxes(-1, -2) for path in edge.sinks]
        rows = jnp.concatenate([rows.reshape(-1, edge.channels) for rows in kernels])
        site = Site(rows, stats.get(edge.sinks[0], Stats()), get_format(format))
        _, applied = search(site)
        if not isinstance(applied, Scaled):
            raise UserError(f"{search.name} is no channel scaling; smooth, awq_scale and rescale are")
        params = fuse_scale(params, model.config, edge, applied.s)
    return dataclasses.replace(model, params=params)


def _producer(edge: Edge) -> str:
    """ "layers_3/attn_norm" -> "attn_norm", "layers_3/attn/v" -> "v"."""
    parts = [p for p in edge.source.split("/") if p not in ("kernel", "scale")]
    return parts[-1]


def _kernel(params: Any, path: str) -> Array:
    for key in path.split("/"):
        params = params[key]
    return jnp.asarray(params, jnp.float32)


def _observed(
    model: Model, kinds: tuple[str, ...], calibration: Calibration, progress: Callable[[int], None]
) -> dict[str, Stats]:
    def apply(params: Any, tokens: Array) -> Array:
        return forward(model.config, params, tokens)

    windows = calibration.tokens[: calibration.used]
    whole = len(windows) - len(windows) % calibration.batch or len(windows)  # batches of one size: one program
    batches = [jnp.asarray(windows[at : at + calibration.batch]) for at in range(0, whole, calibration.batch)]
    return observe(apply, model.params, batches, kinds, progress=progress)
