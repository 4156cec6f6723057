"""Channel scaling: W' = W diag(s), x' = x / s. Channels that matter, or that are hard to round, change places with
others.

    smooth     s_j = max|x_j|^a / max|W_j|^(1-a)              SmoothQuant, arXiv:2211.10438, eq. 4; a = 0 equalizes W
    awq        s_j = (E|x_j|)^a, a from a grid of 20          AWQ, arXiv:2306.00978, eq. 4-5
    rescale    s_j = (H_jj / |W_j|^2)^(1/4)                   QuIP, arXiv:2307.13304, section 4.2

AWQ's a is the one whose nearest rounding has the least output error tr(E H E^T): the published search, on the layer's
own output instead of the block's. All are normalized to sqrt(max s min s) = 1, which no loss sees. A channel without
input or weights has nothing to ask for and takes the geometric mean of the others; none lies 10^4 below that mean.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.reparam.protocol import Applied, Reparam, Site, statistic
from qjax.stats import Stats
from qjax.typing import Array, Float

_SMALLEST = 1e-4  # AWQ's own floor, here of the geometric mean: whatever unit the inputs have


@partial(jax.tree_util.register_dataclass, data_fields=("s",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Scaled(Applied):
    """`s`, f32[n]: W' = W diag(s)."""

    s: Any

    def input(self, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        return x / self.s.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        return w / self.s[None, :]


def scaled(site: Site, s: Float[Array, "n"]) -> tuple[Site, Scaled]:
    """The site with W' = W diag(s)."""
    return site.moved(site.w * s[None, :], site.stats.scale(1.0 / s)), Scaled(s)


def normalized(s: Float[Array, "n"]) -> Float[Array, "n"]:
    """s over the geometric mean of its ends, none of it zero."""
    s = floored(s)
    return s * lax.rsqrt(jnp.max(s) * jnp.min(s))


def floored(s: Float[Array, "n"]) -> Float[Array, "n"]:
    """s, not negative, with the geometric mean of what is positive in place of zeros, and nothing far below it."""
    live = s > 0
    log = jnp.where(live, jnp.log(jnp.where(live, s, 1.0)), 0.0)
    mean = jnp.exp(jnp.sum(log) / jnp.maximum(jnp.sum(live), 1).astype(s.dtype))
    return jnp.maximum(jnp.where(live, s, mean), _SMALLEST * mean)


@dataclasses.dataclass(frozen=True)
class Smooth(Reparam):
    """See `smooth`."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"smooth: alpha lies between 0 and 1, got {self.alpha}")

    @property
    def name(self) -> str:
        return "smooth"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.alpha else ())

    def __call__(self, site: Site) -> tuple[Site, Scaled]:
        top = jnp.max(jnp.abs(site.w), axis=0)
        seen = statistic(site.stats, "absmax", "smooth") if self.alpha else jnp.ones_like(top)
        # A channel without input, or without weights, has nothing to balance.
        alive = (top > 0) & (seen > 0)
        ratio = jnp.where(seen > 0, seen, 1.0) ** self.alpha / jnp.where(top > 0, top, 1.0) ** (1 - self.alpha)
        return scaled(site, normalized(jnp.where(alive, ratio, 0.0)))


def smooth(alpha: float = 0.5) -> Smooth:
    """SmoothQuant: the inputs' outliers move into the weights.

    Args:
      alpha: how far: 0 equalizes the weights' columns, 1 the inputs' channels.
    """
    return Smooth(alpha)


@dataclasses.dataclass(frozen=True)
class AWQ(Reparam):
    """See `awq_scale`."""

    grid: int = 20
    duo: bool = False

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise UserError(f"awq_scale: grid must be at least 1, got {self.grid}")

    @property
    def name(self) -> str:
        return "awq_scale"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"absmean", "H"})

    def __call__(self, site: Site) -> tuple[Site, Scaled]:
        seen = statistic(site.stats, "absmean", "awq_scale")
        statistic(site.stats, "H", "awq_scale")
        form: Any = site.format  # hashable, which its protocol cannot say
        return scaled(site, searched(site.w, seen, site.stats, form, self.grid, self.duo))


def awq_scale(grid: int = 20, duo: bool = False) -> AWQ:
    """AWQ: salient channels scaled up, by the power of E|x| whose nearest rounding has the least output error.

    Args:
      grid: powers tried: 0, 1/grid ... 1 - 1/grid. 0 is plain rounding, so the result is never worse than that.
      duo: s = E|x|^a / E|W|^(1-a), which also evens out the weights; the plain scaling stays among the candidates.
    """
    return AWQ(grid, duo)


@partial(jax.jit, static_argnames=("format", "grid", "duo"))
def searched(
    w: Float[Array, "out n"], absmean: Float[Array, "n"], stats: Stats, format: Format, grid: int, duo: bool = False
) -> Float[Array, "n"]:
    """The scales of least tr(E H E^T) after nearest rounding."""
    assert stats.H is not None
    H, mean_w = stats.H, jnp.mean(jnp.abs(w), axis=0)
    powers = jnp.arange(grid, dtype=jnp.float32) / grid

    def candidate(a: Array, both: bool) -> Array:
        s = floored(absmean) ** a
        return normalized(s / floored(mean_w) ** (1 - a) if both else s)

    def loss(s: Array) -> Array:
        ws = w * s[None, :]
        e = w - format.decode(*format.encode(ws)) / s[None, :]
        return jnp.sum(lax.dot(e, H, precision=lax.Precision.HIGHEST) * e)

    candidates = jax.vmap(lambda a: candidate(a, False))(powers)
    if duo:
        candidates = jnp.concatenate([candidates, jax.vmap(lambda a: candidate(a, True))(powers)])
    losses = lax.map(loss, candidates)
    return candidates[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]


@dataclasses.dataclass(frozen=True)
class Rescale(Reparam):
    """See `rescale`."""

    @property
    def name(self) -> str:
        return "rescale"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"h"})

    def __call__(self, site: Site) -> tuple[Site, Scaled]:
        h, norm = statistic(site.stats, "h", "rescale"), jnp.sum(site.w * site.w, axis=0)
        ratio = (jnp.maximum(h, 0.0) / jnp.where(norm > 0, norm, 1.0)) ** 0.25
        return scaled(site, normalized(jnp.where(norm > 0, ratio, 0.0)))


def rescale() -> Rescale:
    """QuIP's diagonal: W^T W and H get the same diagonal, which minimizes the bound on the loss."""
    return Rescale()
