"""LDLQ, which is GPTQ: each column's error is fed into the columns that are still to be rounded.

    H + lambda diag(H) = L D L^T          t_j = w_j + sum_{k > j} e_k L_kj         w_hat_j = nearest(t_j)

The column of the largest h goes first ("act"), while the most columns can still make up for it. With fixed scales the
loss of a grid without ends falls from s^2 / 12 tr(H) to s^2 / 12 tr(D).

Sources: GPTQ, arXiv:2210.17323, and its act-order and static groups; QuIP, arXiv:2307.13304, sections 3 and theorem 6
(their equality); group-aware order: GPTQModel; cross term: GPTAQ arXiv:2504.02692, QEP arXiv:2504.09629, Qronos
arXiv:2505.11695, in the form W + alpha W cross (H + lambda diag H)^{-1}, the weight that makes of the inputs as they
are now what W made of the float model's.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format, Scales, TileGrid
from qjax.formats.tiles import bound, group_of
from qjax.rounding.curvature import Factor, Order, feedback, ordered, own_metric
from qjax.rounding.protocol import Rounding, State
from qjax.rounding.sweep import fixed_grid, in_place, outer_of, sweep
from qjax.stats import Stats
from qjax.typing import Array, Float, Int, Integer


@dataclasses.dataclass(frozen=True)
class LDLQ(Rounding):
    """See `ldlq`."""

    order: Order = "act"
    grid: Literal["static", "dynamic"] = "static"
    cross: float = 0.0

    def __post_init__(self) -> None:
        if self.order not in ("natural", "act", "group"):
            raise UserError(f"ldlq: order is natural, act or group, got {self.order!r}")
        if self.grid not in ("static", "dynamic"):
            raise UserError(f"ldlq: grid is static or dynamic, got {self.grid!r}")
        if self.grid == "dynamic" and self.order == "act":
            raise UserError(
                "ldlq: a dynamic grid fits a block when its first column comes, and act order tears blocks apart; "
                "use order='group' or grid='static'"
            )

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H", "cross"} if self.cross else {"H"})

    @property
    def factors(self) -> bool:
        """It climbs the damping's ladder itself."""
        return True

    @property
    def starts_over(self) -> bool:
        """Of the stage before it keeps the scales alone."""
        return True

    def check(self, format: Format) -> None:
        """Raise UserError where the format has no blocks to fit one after another."""
        if self.grid == "dynamic" and not (format.block > 1 and format.rows == 1 and _blocks_stand_alone(format)):
            raise UserError(f"ldlq: {format.name} has no blocks along the row, so grid='dynamic' means nothing for it")

    def factored(self, format: Format, H: Float[Array, "n n"], damping: float | Float[Array, ""]) -> Factor:
        """See `Rounding`."""
        size = format.block if self.grid == "dynamic" else group_of(format, H.shape[0])
        return ordered(H, damping, self.order, format.tile[1], size)

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H, tile, target = stats.H, format.tile[1], state.target
        assert H is not None and state.scales is not None
        f = state.factor or self.factored(format, H, state.damping)
        order, c = f.order, f.c
        if self.cross:
            target = corrected(target, stats.cross, self.cross, c, order)
        if self.grid == "dynamic":
            tiles, scales = _fitted_on_the_way(target.T[order], f, format, jnp.diagonal(H))
            return State(scales, in_place(tiles, order, tile), target, f.damping)
        grid = bound(format, state.scales)
        _, codes = fed_back(grid, target, format.columns(state.scales, target.shape), f)
        return State(state.scales, codes, target, f.damping)


def fed_back(
    format: TileGrid,
    w: Float[Array, "rows n"],
    columns: Columns,
    factor: Factor,
    reach: Float[Array, "n"] | None = None,
) -> tuple[Float[Array, "rows n"], Integer[Array, "rows m"]]:
    """w with each column's error fed into those still to come: what it became, and its codes.

    Args:
      columns: the grid.
      factor: of H.
      reach: of each column, see `sweep`; None: all weights are rounded.
    """
    tile, order = format.tile[1], factor.order
    x = w.T[order]
    e, tiles, _ = sweep(
        format, x, jnp.zeros_like(x), feedback(factor.c, tile), fixed_grid(columns, order, outer_of(tile)),
        outer_of(tile), lower=True, metric=own_metric(factor.c, tile),
        reach=None if reach is None else reach[order][:, None],
    )  # fmt: skip
    return jnp.zeros_like(x).at[order].set(x - e).T, in_place(tiles, order, tile)


def _blocks_stand_alone(format: Format) -> bool:
    """Whether two blocks have twice the scales of one: nothing is shared along the row."""
    one, two = (jax.eval_shape(format.fit, jax.ShapeDtypeStruct((1, k * format.block), jnp.float32)) for k in (1, 2))
    return all(two[name].shape[1] == 2 * one[name].shape[1] for name in one)


def ldlq(order: Order = "act", grid: Literal["static", "dynamic"] = "static", cross: float = 0.0) -> LDLQ:
    """Error feedback in the metric of H = E[x x^T].

    Args:
      order: "natural", "act" (descending h; blocks keep their places, so nothing is stored), or "group" (whole
        blocks by their largest h).
      grid: "static" keeps the scales of the stage before; "dynamic" fits each block when its first column comes, to
        the weights as the feedback has left them.
      cross: alpha of the cross term, the share of the predecessors' error that is corrected; 0 to 1.
    """
    return LDLQ(order, grid, cross)


def corrected(
    w: Float[Array, "rows n"], cross: Array | None, alpha: float, c: Float[Array, "n n"], order: Int[Array, "n"]
) -> Float[Array, "rows n"]:
    """W + alpha W cross (H + lambda diag H)^{-1}, from the factor c c^T of that matrix with its columns in `order`."""
    assert cross is not None
    moved = lax.dot(w, cross, precision=lax.Precision.HIGHEST)[:, order]  # a look-up in front would be fused into it
    solved = jax.scipy.linalg.cho_solve((c, True), moved.T)
    return w + alpha * jnp.zeros_like(solved).at[order].set(solved).T


def _fitted_on_the_way(w: Array, factor: Factor, format: Format, h: Array) -> tuple[Array, Scales]:
    """The sweep with each block's scales fitted to what the feedback has made of it: codes by tile, and scales."""
    block, tile, order = format.block, format.tile[1], factor.order
    coupling = feedback(factor.c, tile)

    def free(targets: Array, w: Array, inside: Array) -> Array:
        """A block as the feedback would leave it if nothing in it were rounded: what GPTQ has in its place by then.

        e_J L_JJ = w_J - targets_J where every weight of block J takes its target, and w_J - e_J is what is fitted.
        """
        unit = inside + jnp.eye(block, dtype=inside.dtype)
        return w + jax.scipy.linalg.solve_triangular(unit, targets - w, trans=1, lower=True, unit_diagonal=True)

    def columns_of(j: Array, targets: Array) -> tuple[Columns, Scales]:
        at = lax.dynamic_slice_in_dim(order, j, block)
        inside = lax.dynamic_slice(coupling, (j, j), (block, block))
        targets = free(targets, lax.dynamic_slice_in_dim(w, j, block, 0), inside)
        x = targets[jnp.argsort(at)].T
        scales = format.fit(x, jnp.broadcast_to(h[jnp.sort(at)][None, :], x.shape))
        back = jnp.argsort(jnp.argsort(at))
        columns = format.columns(scales, x.shape)
        return jax.tree.map(lambda a: jnp.repeat(a, block // a.shape[1], axis=1).T[back], columns), scales

    _, codes, fitted = sweep(
        format, w, jnp.zeros_like(w), coupling, columns_of, block, lower=True, metric=own_metric(factor.c, tile)
    )

    def whole(leaf: Array) -> Array:
        """[blocks in their order, rows, x, ...] -> [rows, blocks x, ...]."""
        placed = jnp.zeros_like(leaf).at[order[::block] // block].set(leaf)
        return jnp.moveaxis(placed, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])

    return codes, jax.tree.map(whole, fitted)
