"""Two-sided feedback: rows make up for each other's errors as columns do, in the metric of the output.

    loss = tr(G E H E^T),      G = E[g g^T], g the gradient of the loss at the output, rows in k blocks of m

    G_a + lambda diag(G) = L D L^T    T_b = W_b + sum over earlier turns r of L_rb^T E_r    W_hat_b = round(T_b) in H

Rows are rounded in turns. Whatever the rounding, the loss is then sum_b tr(D_b S_b H S_b^T) with S_b = T_b - W_hat_b:
each turn is a weight of its own in H, and any chain of roundings may take it. Where LDLQ does, column j aims at

    W + (L - 1)^T E (L_H - 1) + (L - 1)^T E + E (L_H - 1)

which is YAQA's target, tile by tile: a tile looks at those before it along both sides, in whatever order they came,
anti-diagonals or turns. The rows of the largest G go first; those of a tile that spans rows stay together. With
white errors S the rows cost sum_i s_i^2 [L^-1 G' L^-T]_ii in held-out G', which tells how far G is to be shrunk to its
diagonal, as in shrinkage.py; where nothing is gained by any share, rows stay alone. With G = 1 this is LDLQ.

Source: YAQA, arXiv:2505.22988 (two-sided feedback, labels sampled from the model); turns of rows, which take any chain
of roundings, and the shrinkage, are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.compiled import untuned
from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.rounding.curvature import cholesky, feedback, order_of
from qjax.rounding.protocol import DAMPING, Rounded, Rounding, round_weight, rounded_of
from qjax.rounding.shrinkage import SHARES, behind_factor, least_share, toward_diagonal
from qjax.stats import Stats
from qjax.typing import Array, Float, Int

WORTH = 0.98
"""Of the loss with rows alone: below it, turns are taken."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turns:
    """In which order the rows of a weight are rounded, and what they owe to each other.

    Attributes:
      order: i32[k, m], the rows of each block, those that come first last.
      coupling: L - 1, f32[k, m, m], rows and columns in that order.
      size: rows of a block in a turn.
    """

    order: Int[Array, "k m"]
    coupling: Float[Array, "k m m"]
    size: int = dataclasses.field(metadata={"static": True})


def turn_size(m: int, turns: int, tied: int = 1) -> int:
    """Rows of a block of m, whole sets of `tied`, in each of at most so many turns of one size."""
    sets = m // tied
    return tied * (sets // max(d for d in range(1, max(1, min(turns, sets)) + 1) if sets % d == 0))


@partial(untuned, static_argnames=("size", "tied"))
def turns_of(
    G: Float[Array, "k m m"],
    a: float | Float[Array, ""],
    size: int,
    damping: float | Float[Array, ""] = DAMPING,
    tied: int = 1,
) -> Turns:
    """The turns that G, shrunk toward its diagonal by a, asks for; their coupling is NaN where G has no factor.

    Args:
      size: rows of a block in a turn.
      tied: rows that stay together.
    """

    def one(G: Array) -> tuple[Array, Array]:
        order = order_of(jnp.diagonal(G), "act", tied, 1)
        c, _ = cholesky(toward_diagonal(G, a)[order][:, order], damping)
        return order, feedback(c, size)

    return Turns(*jax.vmap(one)(G), size)


@partial(untuned, static_argnames=("size", "tied"))
def row_leftover(
    G: Float[Array, "k m m"],
    heldout: Float[Array, "k m m"],
    a: float | Array,
    size: int,
    damping: float | Array,
    tied: int = 1,
) -> Float[Array, "rows"]:
    """diag(L^-1 G' L^-T), row by row: what a unit of rounding error in it costs on held-out tokens; infinite
    where G has no factor."""
    turns = turns_of(G, a, size, damping, tied)

    def one(order: Array, coupling: Array, heldout: Array) -> Array:
        left = behind_factor(coupling + jnp.eye(len(order), dtype=coupling.dtype), heldout[order][:, order])
        return jnp.zeros_like(left).at[order].set(left)

    return lax.map(lambda at: one(*at), (turns.order, turns.coupling, heldout)).reshape(-1)


def turns_for(
    e: Float[Array, "rows n"],
    G: Float[Array, "k m m"],
    heldout: Float[Array, "k m m"],
    turns: int,
    damping: float = DAMPING,
    tied: int = 1,
) -> tuple[float, float, int]:
    """How rows are to make up for each other, told by tokens that made no G.

    Args:
      e: errors of rounding to nearest.
      G, heldout: of the tokens that are used, and of others.
      turns: at most.
      tied: rows that go together.

    Returns: a, one of SHARES; the loss that is expected there, in those of rows alone; the rows of a block in a turn.
    """
    size = turn_size(G.shape[-1], turns, tied)
    s2 = jnp.mean(jnp.square(e), axis=1)

    def cost(a: float) -> float:
        return float(jnp.sum(s2 * row_leftover(G, heldout, a, size, damping, tied)))

    alone = float(jnp.sum(s2 * jnp.diagonal(heldout, axis1=1, axis2=2).reshape(-1)))
    if size == G.shape[-1] or not alone > 0:
        return SHARES[-1], 1.0, size
    a, least = least_share(cost)
    return a, least / alone, size


def one_by_one(turn: Callable[[Array, Any], tuple[Array, Rounded]], e: Array, at: Any) -> tuple[Array, Rounded]:
    """`lax.scan` of turns that are no traced functions: each may go to many cores."""
    made = []
    for b in at:
        e, one = turn(e, b)
        made.append(one)
    return e, jax.tree.map(lambda *a: jnp.stack(a), *made)


def in_turns(
    w: Float[Array, "rows n"],
    turns: Turns,
    format: Format,
    round_rows: Callable[[Array], Rounded],
    scan: Callable[..., tuple[Array, Rounded]] = one_by_one,
) -> Rounded:
    """A weight, its rows in turns.

    Args:
      w: what is to be rounded.
      format: its grid; rows that it holds together stand together in `turns`.
      round_rows: rounds some rows, always as many.
      scan: goes through the turns; `lax.scan` where `round_rows` can be traced.

    Returns: codes and scales of all rows; its losses are sums over turns of those of T.
    """
    k, m = turns.order.shape
    size, count = turns.size, m // turns.size
    target = jnp.take_along_axis(w.reshape(k, m, -1), turns.order[:, :, None], axis=1)

    def turn(e: Array, b: Any) -> tuple[Array, Rounded]:
        made = round_rows(_moved(target, e, turns.coupling, b * size, size).reshape(k * size, -1))
        return _left(target, e, rounded_of(made, format), b * size), made

    _, made = scan(turn, jnp.zeros_like(target), np.arange(count)[::-1])
    rows = (turns.order + m * jnp.arange(k)[:, None]).reshape(k, count, size)
    came = jnp.argsort(rows[:, ::-1].transpose(1, 0, 2).reshape(-1))

    def in_place(a: Array) -> Array:
        """[count, rows of a turn, ...], or what sets of rows have, back where they belong."""
        a = a.reshape(-1, *a.shape[2:])
        together = len(came) // len(a)
        return a[came[::together] // together]

    def total(field: dataclasses.Field[Any]) -> Any:
        values = getattr(made, field.name)
        if field.name in ("scales", "codes", "outliers"):
            return jax.tree.map(in_place, values)
        return jnp.max(values) if field.name == "damping" else jnp.sum(values, axis=0)

    return Rounded(*map(total, dataclasses.fields(Rounded)))


@partial(jax.jit, static_argnames=("size",))
def _moved(target: Array, e: Array, coupling: Array, at: Any, size: int) -> Array:
    """T_b; rows that are still to come have no error yet."""
    owed = lax.dynamic_slice_in_dim(coupling, at, size, 2)
    now = lax.dynamic_slice_in_dim(target, at, size, 1)
    return now + lax.dot_general(owed, e, (((1,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST)


@jax.jit
def _left(target: Array, e: Array, w_hat: Array, at: Any) -> Array:
    """Errors, with those of a turn."""
    w_hat = w_hat.reshape(target.shape[0], -1, target.shape[2])
    now = lax.dynamic_slice_in_dim(target, at, w_hat.shape[1], 1) - w_hat
    return lax.dynamic_update_slice_in_dim(e, now, at, 1)


def round_two_sided(
    w: Float[Array, "rows n"],
    format: Format,
    roundings: tuple[Rounding, ...],
    stats: Stats,
    turns: int = 8,
    a: float = 0.0,
    damping: float = DAMPING,
) -> Rounded:
    """`round_weight`, rows in turns; jittable. What the pipeline does, without its choice of a.

    Args:
      w: rows as G has them, k m.
      stats: H, and G.
      turns: at most; 1 leaves rows alone, as many as rows, or sets of rows, is YAQA.
      a: how far G is shrunk toward its diagonal.

    Returns: as `round_weight`; its damping is NaN where H or G has no factor.

    Raises:
      UserError: no G, or a format whose rows cannot take turns.
    """
    if stats.G is None:
        raise UserError("round_two_sided needs G = E[g g^T] of the weight's output: Stats(H=..., G=...)")
    m, tied = stats.G.shape[-1], format.rows
    if not tied or m % tied:
        raise UserError(f"round_two_sided: {format.name} holds rows together, and G is of blocks of {m} rows")
    found = turns_of(stats.G, a, turn_size(m, turns, tied), damping, tied)
    alone = dataclasses.replace(stats, G=None)
    made = in_turns(w, found, format, lambda rows: round_weight(rows, format, roundings, alone, damping), lax.scan)
    ok = jnp.all(jnp.isfinite(found.coupling))
    return dataclasses.replace(made, damping=jnp.where(ok, made.damping, jnp.nan))
