"""The metric of a layer's output error, made fit for rounding: damping, factors, orders, the loss itself.

    E|(W - W_hat) x|^2 = tr(E H E^T),    H = E[x x^T],    E = W - W_hat                     (the proxy loss)

Damping adds lambda diag(H), not lambda mean(diag H): it does not change with the scale of a channel, and a few large
channels do not drown the others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.typing import Array, Float, Int

Order = Literal["natural", "act", "group"]

_NOISE = 1e-6
"""A diagonal entry below minus this share of the largest is no rounding error."""

_BLOCK = 256
"""Columns below which half a product saves nothing."""

LADDER = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Multiples of the damping that are tried until Cholesky succeeds."""


def alive(H: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """H with a diagonal entry for columns that saw nothing: they neither give nor take feedback."""
    h = jnp.diagonal(H)
    top = jnp.mean(h)
    dead = (h <= 0) & ~jnp.any(H != 0, axis=0)
    return H + jnp.diag(jnp.where(dead, jnp.where(top > 0, top, 1.0), 0.0))


def damped(H: Float[Array, "n n"], damping: Float[Array, ""] | float) -> Float[Array, "n n"]:
    """H + lambda diag(H)."""
    H = alive(H)
    return H + damping * jnp.diag(jnp.diagonal(H))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """H + lambda diag(H) = c c^T, its columns in an order: what all rows under one H share, made once for them.

    Attributes:
      order: i32[n], the column that is rounded first last.
      c: f32[n, n], lower triangular.
      damping: lambda, f32[].
    """

    order: Any  # arrays; Any, because trees of shapes pass through here too
    c: Any
    damping: Any


def ordered(H: Float[Array, "n n"], damping: float | Float[Array, ""], order: Order, tile: int, group: int) -> Factor:
    """The factor of H for a sweep in an order; see `order_of` and `cholesky`."""
    at = order_of(jnp.diagonal(H), order, tile, group)
    return Factor(at, *cholesky(H[at][:, at], damping))


def cholesky(H: Float[Array, "n n"], damping: float | Float[Array, ""]) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """The lower factor of H + lambda diag(H) = c c^T, with the first lambda on the ladder that is enough.

    Args:
      H: symmetric; need not be definite.
      damping: the first lambda tried.

    Returns: f32[n, n], lower triangular, and the lambda used. NaN for both when H is so indefinite that no lambda of
      the ladder helps.
    """
    H = alive(H)
    h = jnp.diagonal(H)
    ladder = jnp.asarray(LADDER, jnp.float32) * damping

    def attempt(i: Array) -> Array:
        # The unit diagonal makes the factor as accurate as float32 allows whatever the channels' scales.
        r = jnp.where(h > 0, lax.rsqrt(jnp.where(h > 0, h, 1.0)), 0.0)
        unit = H * r[:, None] * r[None, :] + ladder[i] * jnp.eye(H.shape[0], dtype=H.dtype)
        return jnp.linalg.cholesky(unit, symmetrize_input=False)

    def failed(c: Array) -> Array:
        return ~jnp.all(jnp.isfinite(jnp.diagonal(c)))

    def more(state: tuple[Array, Array]) -> Array:
        i, c = state
        return failed(c) & (i < len(LADDER) - 1)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, _ = state
        return i + 1, attempt(i + 1)

    i, c = lax.while_loop(more, again, (jnp.int32(0), attempt(jnp.int32(0))))
    r = jnp.where(h > 0, jnp.sqrt(jnp.where(h > 0, h, 1.0)), 1.0)
    c = jnp.tril(c) * r[:, None]  # back in the channels' own scales
    bad = failed(c) | jnp.any(h < -_NOISE * jnp.max(jnp.abs(h)))
    return jnp.where(bad, jnp.nan, c), jnp.where(bad, jnp.nan, ladder[i])


def feedback(c: Float[Array, "n n"], tile: int = 1) -> Float[Array, "n n"]:
    """L - 1 of c c^T = L D L^T: c's columns times the inverse of its diagonal tiles, and nothing on these tiles."""
    n = c.shape[0]
    if tile == 1:
        return c / jnp.diagonal(c)[None, :] * (1.0 - jnp.eye(n, dtype=c.dtype))
    diagonal = tiles_of(c, tile)
    columns = c.reshape(n, -1, tile).transpose(1, 2, 0)  # [n / tile, tile, n]
    solved = jax.vmap(lambda d, x: jax.scipy.linalg.solve_triangular(d, x, lower=True, trans=1))(diagonal, columns)
    return solved.transpose(2, 0, 1).reshape(n, n) * off_tiles(n, tile)


def own_metric(c: Float[Array, "n n"], tile: int) -> Float[Array, "t k k"]:
    """D of c c^T = L D L^T, its tiles: what is left of H for each of them once feedback makes up for it."""
    d = tiles_of(c, tile)
    return jnp.einsum("tij,tkj->tik", d, d, precision=lax.Precision.HIGHEST)


def off_tiles(n: int, tile: int) -> Array:
    """1 where row and column lie in different tiles: f32[n, n]."""
    at = jnp.arange(n) // tile
    return (at[:, None] != at[None, :]).astype(jnp.float32)


def tiles_of(H: Float[Array, "n n"], tile: int) -> Float[Array, "t k k"]:
    """The diagonal tiles of H."""
    at = jnp.arange(H.shape[0]).reshape(-1, tile)
    return H[at[:, :, None], at[:, None, :]]


def descent(H: Float[Array, "n n"], tile: int = 1) -> Float[Array, "n n"]:
    """The coupling of coordinate descent: H_{.,J} H_JJ^{-1} for each tile J, nothing on the diagonal tiles."""
    return over_tiles(H, H, tile) * off_tiles(H.shape[0], tile)


def over_tiles(a: Float[Array, "k n"], H: Float[Array, "n n"], tile: int) -> Float[Array, "k n"]:
    """a_{.,J} H_JJ^{-1} for each tile J."""
    if tile == 1:
        return a / jnp.diagonal(H)[None, :]
    columns = a.reshape(a.shape[0], -1, tile).transpose(1, 2, 0)  # [n / tile, tile, k]
    return jnp.linalg.solve(tiles_of(H, tile), columns).transpose(2, 0, 1).reshape(a.shape)


def order_of(h: Float[Array, "n"], order: Order, tile: int, group: int) -> Int[Array, "n"]:
    """The columns as the sweep wants them: the one rounded first comes last.

    Args:
      h: the diagonal of H.
      order: "natural": from the first column to the last; "act": by descending h; "group": groups by their largest
        h, and inside a group by h, so that groups stay whole.
      tile: columns that stay together.
      group: columns under one scale.
    """
    n = h.shape[0]
    if order == "natural":
        return _tiles(jnp.arange(n // tile)[::-1], tile)
    if order == "act":
        return _tiles(jnp.argsort(jnp.max(h.reshape(-1, tile), axis=1)), tile)
    if order == "group":
        peak = jnp.max(h.reshape(-1, tile), axis=1)
        inside = peak.reshape(-1, group // tile)
        first = jnp.argsort(jnp.max(inside, axis=1))
        ranked = jnp.argsort(inside, axis=1)[first] + first[:, None] * (group // tile)
        return _tiles(ranked.reshape(-1), tile)
    raise ValueError(f"order is natural, act or group, got {order!r}")


def _tiles(order: Array, tile: int) -> Array:
    return (order[:, None] * tile + jnp.arange(tile)[None, :]).reshape(-1)


def proxy(e: Float[Array, "*rows n"], H: Float[Array, "n n"]) -> Float[Array, "*rows"]:
    """e H e^T of each row, H symmetric: its blocks below the diagonal count twice, those above are not multiplied.

    Block after block, for side by side their copies would take as much as H.
    """
    n = H.shape[0]
    count = max((k for k in range(1, 9) if n % k == 0 and n // k >= _BLOCK), default=1)
    size = n // count

    def add(total: Array, at: Array) -> tuple[Array, None]:
        row, column = size * at
        left, right = (lax.dynamic_slice_in_dim(e, start, size, axis=-1) for start in (row, column))
        some = jnp.sum(_dot(left, lax.dynamic_slice(H, (row, column), (size, size))) * right, axis=-1)
        return total + jnp.where(row == column, some, 2.0 * some), None

    pairs = [(i, j) for i in range(count) for j in range(i + 1)]
    return lax.scan(add, jnp.zeros(e.shape[:-1], jnp.float32), jnp.array(pairs, jnp.int32))[0]


def weighed(e: Float[Array, "rows n"], G: Float[Array, "k m m"] | None) -> Float[Array, "rows n"]:
    """G e, its rows in k blocks of m; e where no G is known."""
    if G is None:
        return e
    parts = e.reshape(*G.shape[:2], -1)
    return lax.dot_general(G, parts, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST).reshape(e.shape)


@jax.jit
def two_sided_loss(
    e: Float[Array, "rows n"], H: Float[Array, "n n"], G: Float[Array, "k m m"] | None = None
) -> Float[Array, ""]:
    """tr(G E H E^T), what an error costs where G = E[g g^T] of the output; tr(E H E^T) where G is not known."""
    return jnp.sum(proxy(e, H)) if G is None else jnp.sum(weighed(e, G) * _dot(e, H))


def _dot(e: Array, H: Array) -> Array:
    return lax.dot_general(e, H, (((e.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
