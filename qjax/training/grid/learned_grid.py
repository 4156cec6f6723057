"""Learned scales, offsets and thresholds: gradients by the grid itself, on any format whose scales can be moved.

    w_hat = s T + m,   T = level(u),   u = (w - m) / s,        sums over the weights that share the scale:
    dL/ds = sum g (T - u) inside, g T outside      dL/dm = sum g 0 inside, g outside      dL/dw = estimator(g)

On integers, with `clipped("levels")`, this is LSQ (Esser et al., arXiv:1902.08153, equation 3; T - u = round(v) - v,
and Qn or Qp outside) and, with an offset, LSQ+ (arXiv:2004.09576); on the half-integer levels of `int2_g64_mid` it is
ParetoQ's SEQ (arXiv:2502.02631). With a threshold scale p of its own, levels are chosen on one grid and stand on
another (Dual-LSQ; for three levels, trained ternary quantization, arXiv:1612.01064):

    w_hat = s T + m,   u = (w - m) / p
    dL/ds = sum g T      dL/dp = -sum inside g u s / p      dL/dw = estimator(g) s / p

s, m and p are used as the format stores them (`Format.store`), the gradient goes straight through the storing, and
nested super-scales stay where they were at the start. The parameters that train are dimensionless, s = s0 exp(scale),
p = p0 exp(threshold), m = m0 + s0 offset, all 0 at the start: one rate fits every format, a scale keeps its sign, and
that of a group of zeros stays 0.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats import sound
from qjax.formats.protocol import Format, Scales
from qjax.formats.tiles import tabled
from qjax.rounding.ranges import by_inverse
from qjax.training.grid.estimators import Clipped, Estimator, Position, Reach, over_groups, position_of
from qjax.training.grid.fake_quant import decoded, rounded
from qjax.typing import Array, Float

GridArrays = dict[str, Array]  # "s", and where the format has one "m", and where it is its own "p": f32[*b, G] each


def start(
    fmt: Format, kept: Scales, shape: tuple[int, ...], threshold: Array | None = None
) -> tuple[GridArrays, GridArrays]:
    """Parameters at 0, and the grid that they move: of stored scales, and p where `threshold` gives it.

    Args:
      kept: the format's scales.
      shape: of the weights, contracted axis last.
      threshold: p, f32[*b, G], where levels are chosen on another grid than they stand on.

    Raises:
      UserError: a table of levels, which has no one scale.
    """
    if tabled(fmt):
        raise UserError(f"{fmt.name} has a table of levels and no scale to learn; take scales = refit or frozen")
    s, m = fmt.columns(kept, shape)
    at: GridArrays = {"s": s} | ({} if m is None else {"m": m}) | ({} if threshold is None else {"p": threshold})
    names = {"s": "scale", "m": "offset", "p": "threshold"}
    return {names[k]: jnp.zeros_like(x) for k, x in at.items()}, at


def moved(parameters: GridArrays, at: GridArrays) -> GridArrays:
    """The grid of parameters: s = s0 exp(scale), m = m0 + s0 offset, p = p0 exp(threshold)."""
    grid = {"s": at["s"] * jnp.exp(parameters["scale"])}
    if "m" in at:
        grid["m"] = at["m"] + at["s"] * parameters["offset"]
    if "p" in at:
        grid["p"] = at["p"] * jnp.exp(parameters["threshold"])
    return grid


def encode_on(fmt: Format, kept: Scales, grid: GridArrays, x: Float[Array, "*b n"]) -> tuple[Scales, Array]:
    """What is stored of x on a grid: scales and codes."""
    scales = _stored(fmt, kept, grid["s"], grid.get("m"))
    chosen_on = _stored(fmt, kept, grid["p"], grid.get("m")) if "p" in grid else scales
    return sound.marked(scales, x), rounded(fmt, chosen_on, x)


@partial(jax.jit, static_argnums=0)
def _stored(fmt: Format, kept: Scales, s: Array, m: Array | None) -> Scales:
    return lax.optimization_barrier(fmt.store(*lax.optimization_barrier((kept, (s, m)))))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def learned_quant(
    fmt: Format, estimator: Estimator, axis: int, kept: Scales, grid: GridArrays, w: Float[Array, "*w"]
) -> Float[Array, "*w"]:
    """w on a learned grid, with gradients by w and by the grid.

    Args:
      fmt: the format.
      estimator: what passes to w; its reach (else "cells") says what is inside for s, m and p.
      axis: the contracted axis.
      kept: stored scales that give `Format.store` what it does not move.
      grid: s, m, p, contracted axis last.
      w: f32.

    Returns: the decoded values, f32.
    """
    return _forward(fmt, estimator, axis, kept, grid, w)[0]


def _forward(
    fmt: Format, estimator: Estimator, axis: int, kept: Scales, grid: GridArrays, w: Array
) -> tuple[Array, tuple]:
    scales, codes = encode_on(fmt, kept, grid, jnp.moveaxis(w, axis, -1))
    w_hat = jnp.moveaxis(decoded(fmt, scales, codes), -1, axis)
    return w_hat, (kept, scales, grid, w, w_hat)


def _backward(
    fmt: Format, estimator: Estimator, axis: int, residuals: tuple, g: Array
) -> tuple[None, GridArrays, Array]:
    kept, scales, grid, w, w_hat = residuals
    place = position_of(fmt, scales, w, w_hat, axis)
    reach = estimator.reach if isinstance(estimator, Clipped) else "cells"
    grouped = g.reshape(place.w.shape)
    if "p" in grid:
        chosen_on = _stored(fmt, kept, grid["p"], grid.get("m"))
        back, passed = _apart(place, position_of(fmt, chosen_on, w, w_hat, axis).s, estimator, reach, grouped, axis)
        return None, back, passed.reshape(g.shape)
    inside = place.inside(reach)
    # s (T - u) = w_hat - w and s T = w_hat - m: no division per weight.
    reached = place.w_hat if place.m is None else place.w_hat - place.m
    back = {"s": over_groups(by_inverse(grouped * jnp.where(inside, place.w_hat - place.w, reached), place.s), axis)}
    if place.m is not None:
        back["m"] = over_groups(jnp.where(inside, 0.0, grouped), axis)
    return None, back, estimator(grouped, place).reshape(g.shape)


def _apart(
    stands: Position, p: Array, estimator: Estimator, reach: Reach, g: Array, axis: int
) -> tuple[GridArrays, Array]:
    """The gradients where levels are chosen on p and stand on s."""
    s, m, T = stands.s, stands.m, stands.T
    place = Position(stands.format, stands.w, p * T + (0.0 if m is None else m), p, m)
    passed = jnp.where(place.inside(reach), g, 0.0)
    slope = jnp.where(p == s, 1.0, s / jnp.where(p == 0, 1.0, p))  # dw_hat / dw inside
    back = {"s": over_groups(g * T, axis), "p": -over_groups(slope * passed * place.u, axis)}
    if m is not None:
        back["m"] = over_groups(g - slope * passed, axis)
    return back, estimator(g, place) * slope


learned_quant.defvjp(_forward, _backward)
