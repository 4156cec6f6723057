"""Codes learned by relaxation: each weight a mixture of its level and the levels beside it, annealed to one of them.

    p = softmax(z / tau)        mu = sum_c p_c q_c        v = sum_c p_c q_c^2 - mu^2        c: as it is, above, below
    L = tr(E H E^T) + t sum_ij H_jj v_ij,   E = W - mu        t from 0 to 1,  tau from 1 to 1/10

At t = 1 L is the expected loss of codes drawn from p, weight by weight; it is linear in the p of each weight, so its
least values are single codes. At t = 0 it is the loss of the means alone, which has no local minima. On the way from
one to the other weights settle one after another, each in sight of those that have not: descent, which moves one weight
among settled ones, stops at the first point that no single move betters. Logits z and the shares that scales grow by
learn together, scales as they are stored; the codes at the end are the likeliest, and one pass of descent from these
(descend.py). A step costs one product with H.

Source: GSQ, arXiv:2604.18556 (logits over shifts of a start by GPTQ, temperatures, Lion). It draws Gumbel noise where
v stands here, which a single layer's loss knows in closed form, and its loss is a transformer block's.
Levels of single weights only: the points of lattices, trellises and importance grids have no next one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format
from qjax.formats.tiles import round_tiles
from qjax.rounding.descend import Descend, keep_better, losses
from qjax.rounding.gradient import passed
from qjax.rounding.protocol import Rounding, State, metric, rounded_of
from qjax.rounding.ranges import per_weight
from qjax.stats import Stats
from qjax.typing import Array, Bool, Float, Integer

_COLDEST = 0.1
_SCALES = 0.02  # of the logits' step: what a scale's share moves by
_FAR = 1e4  # times the scale: beyond every level, near enough to tell them apart by their distance
_HALVINGS = 32
_LION = optax.scale_by_lion(b1=0.9, b2=0.95)  # as GSQ has it


@dataclasses.dataclass(frozen=True)
class Relaxed(Rounding):
    """See `relaxed`."""

    steps: int = 300
    lr: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"relaxed: steps must be at least 1, got {self.steps}")
        if not self.lr > 0:
            raise UserError(f"relaxed: lr must be positive, got {self.lr}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def check(self, format: Format) -> None:
        """Raise UserError where single weights have no levels beside their own, or no scale."""
        check_levels("relaxed", format)

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H, kept, shape = metric(state, stats), state.scales, state.target.shape
        assert kept is not None
        columns, h = format.columns(kept, shape), jnp.diagonal(H)[None, :]
        codes, real = candidates(state, format)
        bases = [format.basis(code) for code in codes]
        p = {"z": jnp.zeros(codes.shape, jnp.float32).at[0].set(1.0), "share": jax.tree.map(jnp.ones_like, columns)}

        def moved(share: Columns) -> tuple[Columns, Columns]:
            """The grid before it is stored, and as it is stored with the gradient of the other."""
            free = jax.tree.map(jnp.multiply, columns, share)
            as_stored = format.columns(format.store(kept, lax.stop_gradient(free)), shape)
            return free, jax.tree.map(passed, free, as_stored)

        def at(p: Any, tau: Array) -> tuple[Array, Array]:
            return moments(jnp.where(real, p["z"], -jnp.inf) / tau, values(moved(p["share"])[1], bases))

        def step(i: Array, now: tuple[Any, Any]) -> tuple[Any, Any]:
            p, memory = now
            t = i.astype(jnp.float32) / self.steps
            (mean, _), back = jax.vjp(lambda p: at(p, _COLDEST**t), p)
            e = state.target - mean
            if state.outliers is not None:  # stored exactly, whatever the codes beneath
                e = jnp.where(state.outliers[0], state.target - state.outliers[1], e)
            pulled, uncertain = lax.dot(e, H, precision=lax.Precision.HIGHEST), jnp.broadcast_to(t * h, shape)
            if state.outliers is not None:
                pulled, uncertain = (jnp.where(state.outliers[0], 0.0, g) for g in (pulled, uncertain))
            (gradient,) = back((-2.0 * pulled, uncertain))
            signs, memory = _LION.update(gradient, memory)
            lr = self.lr * 0.5 * (1.0 + jnp.cos(jnp.pi * t))
            share = jax.tree.map(lambda x, s: x - _SCALES * lr * s, p["share"], signs["share"])
            return {"z": p["z"] - lr * signs["z"], "share": share}, memory

        p, _ = lax.fori_loop(0, self.steps, step, (p, _LION.init(p)))
        likeliest = jnp.argmax(jnp.where(real, p["z"], -jnp.inf), axis=0)
        found = jnp.take_along_axis(codes, likeliest[None], axis=0)[0]
        new = dataclasses.replace(state, scales=format.store(kept, moved(p["share"])[0]), codes=found)
        return keep_better(state, Descend(1).swept(new, format, H), format, losses(state, format, H), H)[0]


def relaxed(steps: int = 300, lr: float = 0.05) -> Relaxed:
    """Codes and scales learned by relaxation from those of the stages before; never a larger loss.

    Args:
      steps: gradients taken; each is one product with H. More find better codes.
      lr: the first step of the logits, by a cosine to 0; they start at 1 for the present codes and 0 beside them.
    """
    return Relaxed(steps, lr)


def check_levels(stage: str, format: Format) -> None:
    """Raise UserError where single weights have no levels beside their own, or no scale."""
    if format.tile != (1, 1):
        tile = " x ".join(map(str, format.tile))
        raise UserError(f"{stage}: {format.name} rounds {tile} weights together, and no point has a next one")
    if not jax.eval_shape(format.fit, jax.ShapeDtypeStruct((1, format.block or 256), jnp.float32)):
        raise UserError(f"{stage}: {format.name} has no scales, and its nearest values are the best")


def candidates(state: State, format: Format) -> tuple[Integer[Array, "3 rows n"], Bool[Array, "3 rows n"]]:
    """The state's codes, and those of the levels above and below; whether there are such."""
    assert state.scales is not None and state.codes is not None
    grid = format.columns(state.scales, state.target.shape)
    q, _ = round_tiles(format, grid, rounded_of(dataclasses.replace(state, outliers=None), format))
    size = jnp.sum(jnp.stack([per_weight(jnp.abs(c), q) for c in jax.tree.leaves(grid)]), axis=0)
    above, below = (beside(format, grid, q, far * size) for far in (_FAR, -_FAR))
    codes = jnp.stack([state.codes, above[1], below[1]])
    return codes, jnp.stack([jnp.ones_like(q, bool), above[0] != q, below[0] != q])


def beside(
    format: Format, grid: Columns, q: Float[Array, "rows n"], far: Float[Array, "rows n"]
) -> tuple[Array, Array]:
    """The level next to q toward `far`, and its code; q itself where it is the last.

    `round` is all that is known of a grid: the border of q's cell is found by halving.
    """
    end, _ = round_tiles(format, grid, far)

    def halve(_: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        inside, outside = now
        middle = 0.5 * (inside + outside)
        left = round_tiles(format, grid, q + middle)[0] != q
        return jnp.where(left, inside, middle), jnp.where(left, middle, outside)

    behind = lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(q), end - q))[1]
    return round_tiles(format, grid, q + behind)


def values(grid: Columns, bases: list[tuple[Array, ...]]) -> Float[Array, "c rows n"]:
    """The weights of candidates on a grid, in which they are linear."""
    *theta, m = grid

    def of(basis: tuple[Array, ...]) -> Array:
        terms = [per_weight(t, b) * b for t, b in zip(theta, basis, strict=True)]
        return sum(terms[1:] if m is None else [*terms[1:], per_weight(m, basis[0])], terms[0])

    return jnp.stack([of(basis) for basis in bases])


def moments(
    z: Float[Array, "c rows n"], q: Float[Array, "c rows n"]
) -> tuple[Float[Array, "rows n"], Float[Array, "rows n"]]:
    """Mean and variance of the candidates, drawn by softmax(z)."""
    p = jax.nn.softmax(z, axis=0)
    mean = jnp.sum(p * q, axis=0)
    return mean, jnp.sum(p * jnp.square(q - mean[None]), axis=0)
