"""Rounding and ranges learned by gradient on the layer's output error.

    T = level((w - m) / s + V)        w_hat = s T + m        L = tr(E H E^T),  E = W - W_hat

`learned` is AutoRound (Cheng et al., arXiv:2309.05516, section 3, algorithm 1; intel/auto-round, data_type/int.py):
V in [-1/2, 1/2] for each weight, alpha and beta in [0, 1] for each group, all moved by the sign of their gradient in
steps that fall linearly from 1 / steps to 0; the best of all is kept.

    low' = alpha low    high' = beta high    (s, m) of [low', high'] as stored                 (without m: s' = beta s)

`learned_clipping` is the learnable weight clipping of OmniQuant (arXiv:2308.13137, section 3.2, equation 2): the same
ranges with alpha, beta = sigmoid(a), sigmoid(b), both 4 at the start, by Adam, V = 0: what it leaves is nearest.

The papers' loss is a transformer block's output error on samples; here it is restricted to the one linear map,
E|(W - W_hat) x|^2 with H = E[x x^T], damped. [low, high] is the range of the grid that the stage before left. V counts
in distances to the next level, which makes it the paper's where levels are integers. Where the codes that came in are
not the nearest, as behind `ldlq`, the argument is moved so that V = 0 gives them back, and V looks around them. Where a
format's scales cannot be moved (one for a tensor), V learns alone. The path itself is gradient.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format
from qjax.formats.tiles import bound, round_tiles
from qjax.rounding.gradient import Parameters, shares, trained
from qjax.rounding.protocol import Rounding, State, metric
from qjax.rounding.ranges import ends, gap, grouped, single, units
from qjax.stats import Stats
from qjax.typing import Array

_START = 4.0  # sigmoid(4) = 0.98
_NEARLY = 0.499  # of a gap: as far from its level as a weight may lie and still be rounded to it


class _Learned(Rounding):
    """What the two have in common."""

    steps: int

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def check(self, format: Format) -> None:
        """Raise UserError where weights have no scale."""
        if not jax.eval_shape(format.fit, jax.ShapeDtypeStruct((format.rows or 1, format.block or 256), jnp.float32)):
            raise UserError(
                f"{self}: {format.name} has no scales to learn, and its nearest values are the best; round such a "
                "weight with nearest() alone"
            )


@dataclasses.dataclass(frozen=True)
class Learned(_Learned):
    """See `learned`."""

    steps: int = 200
    lr: float | None = None
    ranges: bool = True

    def __post_init__(self) -> None:
        _check_schedule("learned", self.steps, self.lr)

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        first = 1.0 / self.steps if self.lr is None else self.lr
        columns = _columns(state, format)
        offset, width = _around_codes(state, format)
        p = {"v": jnp.zeros_like(width)}
        if self.ranges:
            p |= {side: jnp.ones_like(columns[0]) for side in _sides(columns)}

        def step(t: Array, p: Parameters, memory: Any, grad: Parameters) -> tuple[Parameters, Any]:
            lr = first * (1.0 - t.astype(jnp.float32) / self.steps)
            moved = {k: p[k] - lr * jnp.sign(grad[k]) for k in p}
            return {k: jnp.clip(x, *((-0.5, 0.5) if k == "v" else (0.0, 1.0))) for k, x in moved.items()}, memory

        columns_of = shares(format, columns) if self.ranges else None
        return trained(
            state,
            format,
            metric(state, stats),
            p,
            columns_of,
            lambda p: offset + width * p["v"],
            step,
            None,
            self.steps,
        )


@dataclasses.dataclass(frozen=True)
class LearnedClipping(_Learned):
    """See `learned_clipping`."""

    steps: int = 200
    lr: float = 1e-2

    def __post_init__(self) -> None:
        _check_schedule("learned_clipping", self.steps, self.lr)

    @property
    def name(self) -> str:
        """See `Rounding`."""
        return "learned_clipping"

    @property
    def nearest_codes(self) -> bool:
        """Its codes are those of its scales: who chooses them anew loses nothing."""
        return True

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        columns = _columns(state, format)
        p = {side: jnp.full_like(columns[0], _START) for side in _sides(columns)}
        to_columns = shares(format, columns)
        memory = {k: (jnp.zeros_like(x), jnp.zeros_like(x)) for k, x in p.items()}

        def step(t: Array, p: Parameters, memory: Any, grad: Parameters) -> tuple[Parameters, Any]:
            new = {k: adam(t, memory[k], grad[k]) for k in p}
            return {k: p[k] - self.lr * new[k][0] for k in p}, {k: new[k][1] for k in p}

        return trained(
            state, format, metric(state, stats), p, lambda p: to_columns(jax.tree.map(jax.nn.sigmoid, p)), None, step,
            memory, self.steps,
        )  # fmt: skip


def learned(steps: int = 200, lr: float | None = None, ranges: bool = True) -> Learned:
    """AutoRound on the layer's output error: roundings and ranges by signed gradients; never a larger loss.

    Args:
      steps: gradients taken; each is one product with H.
      lr: the first step, in levels for V and in shares of the range; None: 1 / steps, which can just reach every bound.
      ranges: the groups' ranges learn too.
    """
    return Learned(steps, lr, ranges)


def learned_clipping(steps: int = 200, lr: float = 1e-2) -> LearnedClipping:
    """OmniQuant's learned clipping on the layer's output error: ranges by Adam, codes nearest; never a larger loss.

    Args:
      steps: gradients taken; each is one product with H.
      lr: Adam's step, in the logit of the share of the range that is kept.
    """
    return LearnedClipping(steps, lr)


def adam(t: Array, moments: tuple[Array, Array], grad: Array) -> tuple[Array, tuple[Array, Array]]:
    """Adam's direction at step t = 0, 1, ..., and its moments after it (decays 0.9 and 0.999)."""
    first = 0.9 * moments[0] + 0.1 * grad
    second = 0.999 * moments[1] + 0.001 * grad * grad
    count = t.astype(jnp.float32) + 1.0
    mean, size = first / (1.0 - 0.9**count), jnp.sqrt(second / (1.0 - 0.999**count))
    return jnp.where(size > 0, mean / jnp.where(size > 0, size, 1.0), 0.0), (first, second)


def _columns(state: State, format: Format) -> Columns:
    assert state.scales is not None
    return format.columns(state.scales, state.target.shape)


def _around_codes(state: State, format: Format) -> tuple[Array, Array]:
    """The offset of the weights that gives the state's codes back, and V's unit: f32[rows, G, size] each.

    V's unit is the distance to the next level; where a level is a point of several weights, sqrt(12) times the rms miss
    of its group, which is that distance where levels lie an even step apart.
    """
    assert state.scales is not None and state.codes is not None
    columns = _columns(state, format)
    *theta, m = columns
    one = len(theta) == 1
    s = theta[0] if one else jnp.ones_like(theta[0])
    still = (jnp.ones_like(s), None) if one else columns
    u = units(grouped(state.target, s), s, m)
    levels = bound(format, state.scales)
    nearest, codes = round_tiles(levels, still, u.reshape(state.target.shape))
    nearest = nearest.reshape(u.shape)
    B = [b.reshape(u.shape) for b in levels.basis(state.codes)]
    t = B[0] if one else sum(c[..., None] * b for c, b in zip(theta, B, strict=True))
    same = _in_tiles(state.codes == codes, format, state.target.shape[1]).reshape(u.shape)
    if not single(format, columns):
        width = jnp.sqrt(12.0 * jnp.mean(jnp.square(u - nearest), axis=-1, keepdims=True))
        return jnp.where(same, 0.0, t - u), jnp.broadcast_to(width, u.shape)
    lo, hi = ends(format)
    up = ((u > nearest) | (t == lo)) & (t < hi)  # the neighbour that the nearest rounding passed over
    width = gap(format, t, up)
    off = jnp.clip(u - nearest, -_NEARLY * width, _NEARLY * width)
    return jnp.where(same, 0.0, t + off - u), width


def _in_tiles(same: Array, format: Format, n: int) -> Array:
    """Whether all codes of a weight's tile are the same: bool[rows, m] -> bool[rows, n]."""
    (r, k), rows = format.tile, len(same)
    tiles = same.reshape(rows // r, r, n // k, -1).all(axis=(1, 3))
    return jnp.broadcast_to(tiles[:, None, :, None], (rows // r, r, n // k, k)).reshape(rows, n)


def _sides(columns: Columns) -> tuple[str, ...]:
    return ("high",) if columns[-1] is None else ("low", "high")


def _check_schedule(name: str, steps: int, lr: float | None) -> None:
    if steps < 1:
        raise UserError(f"{name}: steps must be at least 1, got {steps}")
    if lr is not None and not lr > 0:
        raise UserError(f"{name}: lr must be positive, got {lr}")
