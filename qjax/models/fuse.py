"""Exact changes of variables folded into a decoder's weights: the file that carries them is a plain one.

    scale     W x     = (W diag(d)) (x / d)                                         along an edge of `graph`
    fold      W (g n) = (W diag(g)) n,  g = 1                                       n = x / rms(x)
    residual  x' = R x:  E' = E R^T,  W_o' = R W_o,  W_down' = R W_down,  W_in' = W_in R^T          (R1)
    values    v' = R v:  W_v' = R W_v of each head,  W_o' = W_o R^T of each head                    (R2)

R is orthogonal. An RMSNorm without a gain commutes with it, n(R x) = R n(x), hence the gains are folded first. Source:
QuaRot, arXiv:2404.00456, sections 3 and 4; SliceGPT, arXiv:2401.15024, theorem 1, for the invariance; R1 and R2 are
SpinQuant's names, arXiv:2405.16406, section 3.

A rotation is given as what it does to a last axis, `rotate(x) = x R^T`. That is all weights need. In the files' layout
(out, in), the input side W R^T is rotate(W), row by row, and the output side R W is rotate(W^T)^T; flax kernels
(in, out) want the same with the sides exchanged.

All weights come back as float32 arrays, whatever they were stored in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families import weight_names
from qjax.models.graph import Edge, edges
from qjax.models.model import Model, Params
from qjax.models.turned import Rotation, turned_residual, turned_values
from qjax.reparam.hadamard import randomized
from qjax.tensor import is_qtensor

_TOLERANCE = 1e-5
"""How far a rotation may be from orthogonal, relative to the vectors it is tried on."""


def fuse_scale(params: Params, config: DecoderConfig, edge: Edge, d: Any) -> Params:
    """Multiply an edge's consumers by d and divide its producer by it: W x = (W diag(d)) (x / d).

    Args:
      params: floats, the tree of `Decoder(config)`; not modified.
      config: the architecture.
      edge: one of `edges(config)`.
      d: f32[channels], positive.

    Raises:
      UserError: an edge that this config does not have, a d of another length or with a channel that is not positive
        and finite, a packed weight.
    """
    flat = _flat(params, config)
    if edge not in edges(config):
        raise UserError(f"{edge.name}: this decoder has no such edge; `edges(config)` lists those it has")
    scale = np.asarray(d, np.float32)
    if scale.shape != (edge.channels,):
        raise UserError(
            f"{edge.name}: d has shape {list(scale.shape)}, its {edge.channels} channels want one number each"
        )
    with np.errstate(divide="ignore", over="ignore"):
        bad = np.flatnonzero(~((scale > 0) & np.isfinite(scale) & np.isfinite(1 / scale)))
    if bad.size:
        raise UserError(f"{edge.name}: d of channel {bad[0]} is {scale[bad[0]]}, it must be positive and finite")
    by = jnp.asarray(scale)
    flat |= _widened(flat, edge.sinks, by)
    source = flat[edge.source]
    flat[edge.source] = (source + edge.offset) / by.reshape((1,) * (source.ndim - 1) + by.shape) - edge.offset
    if edge.bias is not None:
        flat[edge.bias] = flat[edge.bias] / by
    return unflatten_dict(flat, sep="/")


def fold_norms(params: Params, config: DecoderConfig, untie: bool = False) -> tuple[Params, DecoderConfig]:
    """Move the gain of every norm in front of weights into these weights: W (g n) = (W diag(g)) n, g = 1.

    The norms of q and k and those behind attention and MLP (Gemma 2/3) have no weight behind them and stay.

    Args:
      params: floats, the tree of `Decoder(config)`; not modified.
      config: the architecture.
      untie: give a tied model a head of its own, for the final norm's gain to go into. llama.cpp reads one for every
        family but Gemma 2, whose heads it takes to be tied.

    Returns: the params, and the config they belong to: with `untie` its head is its own.

    Raises:
      UserError: the head is tied, the final norm's gain is not 1, and `untie` was not asked for; a packed weight.
    """
    flat = _flat(params, config)
    if config.tied and untie:
        flat["head/kernel"] = flat["embed/embedding"].T
        config = dataclasses.replace(config, tied=False)
    elif config.tied and not np.all(np.asarray(flat["final_norm/scale"]) + config.norm_offset == 1.0):
        raise UserError(
            "final_norm's gain cannot go into a tied head, the embedding: untie=True gives it one of its own"
        )
    for edge in edges(config):
        if edge.is_norm:
            gain = flat[edge.source] + edge.offset
            flat |= _widened(flat, edge.sinks, gain)
            flat[edge.source] = jnp.full_like(gain, 1.0 - edge.offset)
    return unflatten_dict(flat, sep="/"), config


def rotate_residual(
    params: Params, config: DecoderConfig, rotate: Rotation, untie: bool = False
) -> tuple[Params, DecoderConfig]:
    """Rotate the residual stream, x' = R x (R1), after `fold_norms`.

    Embedding rows and the outputs of o and down become R y; the inputs of q, k, v, gate, up, routers and head W R^T. A
    tied head whose final norm has no gain turns with the embedding and stays tied.

    Args:
      params: floats, the tree of `Decoder(config)`; not modified.
      config: the architecture.
      rotate: x f32[..., dim] -> x R^T.
      untie: give a tied model a head of its own.

    Returns: the params, and the config they belong to, as of `fold_norms`.

    Raises:
      UserError: a map that is not orthogonal or not of length dim, norms behind attention and MLP (Gemma 2/3), a tied
        head without `untie`, a packed weight.
    """
    check_residual(config)
    _check_orthogonal(rotate, config.dim, "dim")
    folded, config = fold_norms(params, config, untie)
    return unflatten_dict(turned_residual(_flat(folded, config), config, rotate), sep="/"), config


def check_residual(config: DecoderConfig) -> None:
    """Raise UserError where a residual stream cannot be rotated, whatever the rotation."""
    if config.post_norms:
        raise UserError(
            f"the residual stream of {config.family} cannot be rotated: norms with gains lie between o or down and the "
            "stream (post_norms)"
        )


def rotate_values(params: Params, config: DecoderConfig, rotate: Rotation | Sequence[Rotation]) -> Params:
    """Rotate each head's values, v' = R v, and o's input back (R2).

    Attention adds positions, not channels, and the query heads of a group share their values: the same R in every head
    is exact under grouped queries too.

    Args:
      params: floats, the tree of `Decoder(config)`; not modified.
      config: the architecture.
      rotate: x f32[..., head_dim] -> x R^T; one for all layers, or one for each.

    Raises:
      UserError: a map that is not orthogonal or not of length head_dim, weights of other shapes than the config's, a
        packed weight, values in one weight with q and k (fused_qkv), heads of two sizes, values that are keys (k_eq_v),
        gates.
    """
    check_values(config)
    each = list(rotate) if isinstance(rotate, Sequence) else [rotate] * config.layers
    for one in dict.fromkeys(each):
        _check_orthogonal(one, config.head_dim, "head_dim")
    return unflatten_dict(turned_values(_flat(params, config), config, each), sep="/")


def check_values(config: DecoderConfig) -> None:
    """Raise UserError where the values of heads cannot be rotated, whatever the rotation."""
    if config.fused_qkv:
        raise UserError(f"the values of {config.family} cannot be rotated alone: q, k and v are one weight (fused_qkv)")
    if config.kv_rank:
        raise UserError(f"the values of {config.family} cannot be rotated alone: they share attn/kv_b with keys")
    if config.k_eq_v or config.global_head_dim:
        raise UserError(
            f"the values of {config.family} cannot be rotated alone: heads have two sizes, or values are keys as well"
        )
    if config.attn_gate or config.linear:
        raise UserError(f"the values of {config.family} cannot be rotated: gates multiply them number by number")


def rotated(model: Model, seed: int, values: bool = True, untie: bool = False) -> Model:
    """The same model in random Hadamard coordinates: `rotate_residual`, and `rotate_values` if asked for.

    Args:
      model: its weights are floats.
      seed: of the signs.
      values: rotate the values of each head too.
      untie: give a tied model a head of its own.

    Returns: a model with the same logits and tokenizer.

    Raises:
      UserError: as `rotate_residual`; a dim or head_dim without a Hadamard matrix (`rotate_residual` takes any map).
    """
    params, config = rotate_residual(model.params, model.config, partial(randomized, seed=seed), untie)
    if values:
        params = rotate_values(params, config, partial(randomized, seed=seed, salt=1))
    return dataclasses.replace(model, config=config, params=params)


def _flat(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """Path -> leaf, with the decoder's own weights in float32; a UserError where one is not what the config says."""
    flat = flatten_dict(params, sep="/")
    for weight in weight_names(config):
        path = "/".join(weight.path)
        leaf = flat.get(path)
        if leaf is None:
            raise UserError(f"{path} is missing from the params")
        if is_qtensor(leaf):
            raise UserError(f"{path} is packed ({leaf.format.name}): fuse into the float weights, then quantize")
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.shape != weight.shape:
            raise UserError(f"{path} is {leaf.dtype}{list(leaf.shape)}, by its config it is float{list(weight.shape)}")
        flat[path] = jnp.asarray(leaf).astype(jnp.float32)
    return flat


def _widened(flat: dict[str, Any], sinks: tuple[str, ...], by: Array) -> dict[str, Array]:
    """The kernels (in, out), or stacks of them, with their input channels multiplied."""
    return {sink: flat[sink] * by.reshape((1,) * (flat[sink].ndim - 2) + (-1, 1)) for sink in sinks}


def _check_orthogonal(rotate: Rotation, n: int, name: str) -> None:
    """A UserError unless the map keeps the inner products of a few vectors, which makes it linear on them too."""
    a, b, c = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
    x = jnp.asarray(np.stack([a, b, c, a + b]))
    try:
        y = np.asarray(rotate(x))
    except TypeError as error:  # a matrix of another size
        raise UserError(f"rotate does not take vectors of length {n} ({name}): {str(error).splitlines()[0]}") from error
    if y.shape != x.shape:
        raise UserError(f"rotate made {list(y.shape)} of {list(x.shape)}, it must keep the shape ({name} is {n})")
    before, after = (v.astype(np.float64) @ v.astype(np.float64).T for v in (np.asarray(x), y))
    if not np.abs(after - before).max() <= _TOLERANCE * n:
        raise UserError("rotate is not orthogonal: it changes the lengths or angles of vectors, and so the model")
