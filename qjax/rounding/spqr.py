"""SpQR: error feedback that leaves out the weights it cannot round, and stores these exactly.

    tau = share mean_j(var(W_:j) D_j)          H + lambda diag(H) = L D L^T
    t_j = w_j + sum_{k > j} e_k L_kj           w_hat_j = nearest(t_j), or t_j where (t_j - nearest(t_j))^2 D_j > tau

(t - q)^2 D_j is what a miss costs once the columns behind it have made up for what they can: GPTQ's (t - q)^2 / U_jj^2.
Before the feedback begins, a weight that its group would miss by so much with a range made of the others is replaced by
their mean, so that it does not spoil the group's range. The range is that of the format's unit levels: from the lowest
to the highest of the others where levels have an offset, else so wide that both ends reach. Outliers go into a CSR part
of 32 bits each (reparam/split.py).

Source: SpQR, arXiv:2306.03078, section 4.1 and algorithm 1; here with static groups, so that columns keep their places.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.formats.tiles import bound, group_of
from qjax.rounding.curvature import Factor, Order, ordered
from qjax.rounding.ldlq import fed_back
from qjax.rounding.protocol import Rounding, State
from qjax.rounding.ranges import level, single
from qjax.stats import Stats
from qjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class SpQR(Rounding):
    """See `spqr`."""

    threshold: float = 0.2
    order: Order = "act"
    loo: bool = True

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"spqr: threshold must be positive (infinite: no outliers), got {self.threshold}")
        if self.order not in ("natural", "act", "group"):
            raise UserError(f"spqr: order is natural, act or group, got {self.order!r}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    @property
    def fits(self) -> bool:
        """It fits the scales itself."""
        return True

    @property
    def whole(self) -> bool:
        """Its threshold looks at all rows of a weight."""
        return True

    @property
    def factors(self) -> bool:
        """It climbs the damping's ladder itself."""
        return True

    def factored(self, format: Format, H: Float[Array, "n n"], damping: float | Float[Array, ""]) -> Factor:
        """See `Rounding`."""
        return ordered(H, damping, self.order, format.tile[1], group_of(format, H.shape[0]))

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        H, w = stats.H, state.target
        assert H is not None
        f = state.factor or self.factored(format, H, state.damping)
        D = jnp.square(jnp.diagonal(f.c))
        D = jnp.zeros_like(D).at[f.order].set(D)  # of the columns in their places
        live = jnp.diagonal(H) > 0  # a miss costs nothing in the other columns
        tau = self.threshold * jnp.mean(jnp.var(w, axis=0) * D, where=live)
        reach = jnp.where(live, jnp.sqrt(tau / jnp.where(D > 0, D, 1.0)), jnp.inf)
        scales = format.fit(without_outliers(w, reach, group_of(format, w.shape[1]), format) if self.loo else w)
        w_hat, codes = fed_back(bound(format, scales), w, format.columns(scales, w.shape), f, reach)
        # Rounded weights lie on the grid up to float32; outliers farther from it than their column's reach.
        missed = jnp.abs(w_hat - format.decode(scales, codes)) > 0.5 * reach[None, :]
        return State(scales, codes, w, f.damping, (missed, w_hat))


def spqr(threshold: float = 0.2, order: Order = "act", loo: bool = True) -> SpQR:
    """Error feedback with outliers kept exactly.

    Args:
      threshold: share of the mean column sensitivity above which a miss makes an outlier; infinite: none, GPTQ.
      order: of the columns, as for `ldlq`.
      loo: leave outliers out of their group's range (the leave-one-out test of the paper).
    """
    return SpQR(threshold, order, loo)


def without_outliers(
    w: Float[Array, "rows n"], reach: Float[Array, "n"], group: int, format: Format
) -> Float[Array, "rows n"]:
    """w with each weight that the range of its group's others would miss by more than `reach` at the others' mean.

    As it is where levels have no range: points of several weights, learned tables, a scale for each weight.
    """
    columns = jax.eval_shape(lambda: format.columns(format.fit(w), w.shape))
    if group == 1 or not single(format, columns):
        return w
    x = w.reshape(w.shape[0], -1, group)
    high, low = (_but_one(x, sign) for sign in (1.0, -1.0))
    low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
    least, most = level(format, jnp.array([-_FAR, _FAR], jnp.float32))  # of the unit levels
    if columns[-1] is None:
        s = jnp.maximum(high / most, jnp.where(least < 0, low / jnp.minimum(least, -1e-30), 0.0))
        m = jnp.zeros_like(s)
    else:
        s = (high - low) / (most - least)
        m = low - s * least
    u = (x - m) / jnp.where(s > 0, s, 1.0)
    q = m + s * level(format, u)
    outlier = jnp.abs(x - q) > reach.reshape(1, -1, group)
    rest = jnp.sum(jnp.where(outlier, 0.0, x), axis=-1, keepdims=True)
    mean = rest / jnp.maximum(jnp.sum(~outlier, axis=-1, keepdims=True), 1).astype(x.dtype)
    return jnp.where(outlier, mean, x).reshape(w.shape)


_FAR = 1e30  # farther out than any level but those of floats, which have no end


def _but_one(x: Array, sign: float) -> Array:
    """The largest (sign 1) or smallest (sign -1) of each group without the weight itself."""
    top = jnp.sort(sign * x, axis=-1)[..., -2:]
    return sign * jnp.where(sign * x >= top[..., 1:], top[..., :1], top[..., 1:])
