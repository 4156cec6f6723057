"""Proximal quantization: weights pulled towards the levels of their grid, harder with every step, at last onto them.

    u <- u + D(gradient at w)        w = prox_rho(u)        rho from 1 (w = u) to 0 (w = quantize(u))

D is any optimizer's update of the latent weights u; the model sees w, and the gradient there moves u. At rho = 0 this
is the straight-through estimator. Between two neighbouring levels a < b, and beyond the outermost level e,

    prox_rho(u) = clip(c + (u - c) / rho, a, b),  c = (a + b) / 2             prox_rho(u) = e + rho (u - e)

flat at the levels, with the slope 1 / rho around the middle; continuous and monotone in u, and continuous in rho up to
1. It is the proximal map argmin_w (w - u)^2 / 2 + phi(w) of bumps that are 0 at the levels alone (the sum is convex):

    phi(w) = (1 - rho) (w - a) (b - w) / 2                                    phi(w) = (1 / rho - 1) (w - e)^2 / 2

Source: PARQ, Jin et al., arXiv:2503.15748: the method AProx, and the map and the sigmoid for rho of its published
implementation, which however sets w = e beyond the outermost level as soon as rho < 1. Where nothing is known but the
nearest level w_hat (lattices, trellises), every cell is treated as that outer range is here,

    prox_rho(u) = w_hat + rho (u - w_hat)

which is BinaryRelax (Yin et al., arXiv:1801.06313): continuous in cells, with jumps between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.formats.tiles import tabled
from qjax.rounding.ranges import gap, level, units
from qjax.tensor import QTensor, dequantize, quantize
from qjax.typing import Array, Float, Int

Prox = Callable[[Array, Array], Array]


class ParqState(NamedTuple):
    """Updates made, the latent weights u, and the state of the optimizer that moves them."""

    step: Int[Array, ""]
    latent: Any
    inner: Any


def parq(inner: optax.GradientTransformation, prox: Prox, rho: optax.Schedule) -> optax.GradientTransformation:
    """Let an optimizer move latent weights, and the parameters be what the proximal map makes of them.

    To be put around the optimizer of the weights that are quantized: a `Group`'s `wrap`, or a part of
    `optax.partition`. Parameters are p + (w - p), which may miss w by a rounding in the step in which w goes to another
    level; what is exported is therefore quantized from `latent`.

    Args:
      inner: a complete optimizer, rate and decay included; it sees u as the parameters.
      prox: from (u, rho) to w of u's shape: `piecewise_affine` or `relaxed`.
      rho: from the step (f32, counted from 0) to the inverse slope, such as `inverse_slope`.

    Returns: an optax transformation; its `update` wants the parameters.
    """

    def init(params: Any) -> ParqState:
        return ParqState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), inner.init(params))

    def update(grads: Any, state: ParqState, params: Any = None) -> tuple[Any, ParqState]:
        if params is None:
            raise UserError("parq needs the parameters: update(grads, state, params)")
        delta, inner_state = inner.update(grads, state.inner, state.latent)
        u = optax.apply_updates(state.latent, delta)
        slope = jnp.asarray(rho(state.step.astype(jnp.float32)), jnp.float32)
        w = _each_kind(prox, u, slope)

        def moved(p: Array, before: Array, d: Array, x: Array, y: Array) -> Array:
            # p + (y - p) is not always y; where nothing is pulled anywhere, the optimizer's own step is exact.
            return jnp.where((p == before) & (x == y), d, y - p)

        updates = jax.tree.map(moved, params, state.latent, delta, u, w)
        return updates, ParqState(optax.safe_increment(state.step), u, inner_state)

    return optax.GradientTransformation(init, update)


def latent(opt_state: Any, params: Any) -> Any:
    """The parameters with the latent weights u in place of w: what to quantize for export.

    Args:
      opt_state: of an optimizer with `parq` anywhere inside.
      params: the parameters it trains.
    """

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ParqState)):
        if isinstance(state, ParqState):
            params = jax.tree.map(lambda u, p: p if is_masked(u) else u, state.latent, params, is_leaf=is_masked)
    return params


def piecewise_affine(format: str | Format, axis: int = -1) -> Prox:
    """The map of PARQ on a format whose levels are single numbers; its scales are fitted to u anew in every step.

    Args:
      format: a name or a Format.
      axis: the contracted axis of the weights, along which blocks run.

    Raises:
      UserError: a format that rounds several weights together.
    """
    fmt = get_format(format)
    if fmt.tile != (1, 1):
        tile = " x ".join(map(str, fmt.tile))
        raise UserError(f"{fmt.name} rounds tiles of {tile} weights, which have no neighbouring levels; use relaxed")
    if tabled(fmt):
        raise UserError(f"{fmt.name} fits a table of levels to each row and has none of a unit scale; use relaxed")

    def prox(u: Array, rho: Array) -> Array:
        q = quantize(u, fmt, axis)
        w_hat = dequantize(q)
        return between(u, w_hat, _half_gap(u, w_hat, q), rho)

    return prox


def relaxed(quantizer: Callable[[Array], Array]) -> Prox:
    """The map of BinaryRelax: all it needs is a function from weights to their nearest levels."""

    def prox(u: Array, rho: Array) -> Array:
        return between(u, quantizer(u), jnp.zeros_like(u), rho)

    return prox


def between(
    u: Float[Array, "*w"], w_hat: Float[Array, "*w"], h: Float[Array, "*w"], rho: Float[Array, ""]
) -> Float[Array, "*w"]:
    """prox_rho(u), from the nearest level and how far the border of its cell lies; u and w_hat to the bit at 1 and 0.

    Args:
      u: latent weights.
      w_hat: the level of each.
      h: half the distance from w_hat to the next level on u's side; 0: none is known.
      rho: the inverse slope, from 1 to 0.

    >>> u = jnp.array([0.1, 0.4, 0.6, 1.4])  # levels 0 and 1
    >>> w = between(u, jnp.round(u), jnp.array([0.5, 0.5, 0.5, 0.0]), jnp.float32(0.5))
    >>> [round(float(x), 3) for x in w]
    [0.0, 0.3, 0.7, 1.2]
    """
    d = u - w_hat
    slope = jnp.where(rho > 0.0, rho, 1.0)
    step = jnp.sign(d) * jnp.clip(h - (h - jnp.abs(d)) / slope, 0.0, 2.0 * h)
    w = w_hat + jnp.where(h > 0.0, step, rho * d)
    return jnp.where(rho >= 1.0, u, jnp.where(rho > 0.0, w, w_hat))


def _each_kind(prox: Prox, u: Any, rho: Array) -> Any:
    """prox_rho of every leaf; leaves of one shape and type go in one call, which is compiled once."""
    leaves, structure = jax.tree.flatten(u)
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kinds.setdefault((leaf.shape, str(leaf.dtype)), []).append(i)
    for alike in kinds.values():
        if len(alike) == 1:
            leaves[alike[0]] = prox(leaves[alike[0]], rho)
            continue
        together = jax.vmap(prox, (0, None))(jnp.stack([leaves[i] for i in alike]), rho)
        for k, i in enumerate(alike):
            leaves[i] = together[k]
    return jax.tree.unflatten(structure, leaves)


def inverse_slope(start: int, end: int, steepness: float = 10.0) -> optax.Schedule:
    """rho as a function of the step: 1 up to `start`, 0 from `end` on, half-way down in the middle, along a sigmoid.

        rho = (1 - tanh(k (x - 1/2) / 2) / tanh(k / 4)) / 2        x = (step - start) / (end - start)

    Args:
      start: the last step that is not pulled to the grid.
      end: the first that is on it: let it come before the last step of the training.
      steepness: k, above 0; small: a straight line.

    Raises:
      UserError: an end that is not behind the start, a steepness that is not above 0.

    >>> [round(float(inverse_slope(100, 200)(step)), 3) for step in (0, 100, 125, 150, 175, 200, 300)]
    [1.0, 1.0, 0.93, 0.5, 0.07, 0.0, 0.0]
    """
    if start >= end or steepness <= 0.0:
        raise UserError(f"inverse_slope wants start < end and steepness > 0, got {start}, {end} and {steepness}")

    def rho(step: Any) -> Array:
        x = (jnp.asarray(step, jnp.float32) - start) / (end - start)
        middle = 0.5 * (1.0 - jnp.tanh(0.5 * steepness * (x - 0.5)) / jnp.tanh(0.25 * steepness))
        return jnp.where(x <= 0.0, 1.0, jnp.where(x >= 1.0, 0.0, middle))

    return rho


def _half_gap(u: Array, w_hat: Array, q: QTensor) -> Array:
    """How far the border lies between each w_hat and the next level on u's side; 0 where there is none."""
    u, w_hat = (jnp.moveaxis(x, q.axis, -1) for x in (u, w_hat))
    scales, _ = q.format.unpack(q.leaves)
    s, m = q.format.columns(scales, u.shape)
    s = s.reshape(-1, s.shape[-1])
    m = m if m is None else m.reshape(s.shape)
    t = level(q.format, units(w_hat.reshape(*s.shape, -1), s, m))
    up = (u > w_hat).reshape(t.shape) ^ (s < 0.0)[..., None]
    h = 0.5 * jnp.abs(s)[..., None] * gap(q.format, t, up)
    h = jnp.where(jnp.isfinite(h), h, 0.0)  # float16 as a format: its levels end below where `gap` looks
    return jnp.moveaxis(h.reshape(u.shape), -1, q.axis)
