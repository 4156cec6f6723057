"""Rotations of a decoder's weights as pure functions of the rotation, so that a gradient reaches it.

    residual  x' = R x:  E' = E R^T,  W_o' = R W_o,  W_down' = R W_down,  W_in' = W_in R^T          (R1)
    values    v' = R v:  W_v' = R W_v of each head,  W_o' = W_o R^T of each head                    (R2)

`fuse.py` looks at models and maps before it calls these; R1 and R2 are SpinQuant's names, arXiv:2405.16406, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from qjax.models.config import DecoderConfig
from qjax.models.graph import edges

Rotation = Callable[[Array], Array]
"""x f32[..., n] -> x R^T f32[..., n], with R orthogonal."""


def turned_residual(flat: dict[str, Any], config: DecoderConfig, rotate: Rotation) -> dict[str, Any]:
    """The weights with the residual stream turned: x' = R x.

    Args:
      flat: {path: f32} of a decoder whose norms in front of weights have no gain (`fold_norms`).
      config: the architecture.
      rotate: of vectors of length dim.
    """
    new = dict(flat)
    for path in flat:
        if path == "embed/embedding" or path.endswith(("/o/kernel", "/o/bias", "/down/kernel", "/down/bias")):
            new[path] = rotate(flat[path])
    for edge in edges(config):
        if edge.is_residual:
            new |= {sink: rotate(flat[sink].swapaxes(-1, -2)).swapaxes(-1, -2) for sink in edge.sinks}
    return new


def turned_values(flat: dict[str, Any], config: DecoderConfig, rotations: Sequence[Rotation]) -> dict[str, Any]:
    """The weights with each head's values turned: v' = R v, with an R for each layer.

    Args:
      flat: {path: f32} of a decoder with values of its own (`fuse.check_values`).
      config: the architecture.
      rotations: of vectors of length head_dim, one for each layer.
    """
    new = dict(flat)
    for i, rotate in enumerate(rotations):
        attn, d = f"layers_{i}/attn", config.head_dim
        for path in (f"{attn}/v/kernel", f"{attn}/v/bias")[: 2 if config.qkv_bias else 1]:
            v = flat[path]
            new[path] = rotate(v.reshape(*v.shape[:-1], config.kv_heads, d)).reshape(v.shape)
        o = flat[f"{attn}/o/kernel"]
        by_head = o.T.reshape(config.dim, config.heads, d)
        new[f"{attn}/o/kernel"] = rotate(by_head).reshape(o.T.shape).T
    return new
