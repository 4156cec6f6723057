"""Half-quadratic quantization: the offsets of a grid fitted to the weights alone, in a norm that minds no outliers.

    min_m  sum |w - w_hat|^p,  p < 1        split with e ~ w - w_hat, group by group:

    e <- shrink(w - s T - m),   shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)        T = level((w - m) / s)
    m <- mean(w - e - s T),     beta <- kappa beta

The zero point of the paper is z = -m / s. Scales stay where `format.fit` has them, as in the paper, whose start is
min-max: formats named without a search, such as uint4_g64_zf16, fit so. beta is measured in the weights' own units:
errors below beta^(-1 / (2 - p)), 0.17 at the defaults, are shrunk to 0, and m is then the plain mean of w - s T. What
beta is to weights w, c^(p - 2) beta is to c w: 10 at unit weights is 1600 at weights of 0.02.

Where a format stores z as an integer (uint4_g64) or m as a code (Q4_K), `store` rounds it and little of the gain is
left; float zeros (uint4_g64_zf16, Q4_1) keep it.

Source: Badri & Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023 (mobiusml/hqq,
hqq/core/optimize.py). There the iteration ends once mean |w - w_hat| of the tensor stops falling; here every group goes
all the way and keeps the offset that is best as stored, in the norm itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format, Scales
from qjax.rounding.protocol import Rounding, State
from qjax.rounding.ranges import grouped, level, units
from qjax.stats import Stats
from qjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class HQQ(Rounding):
    """See `hqq`."""

    iterations: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"hqq: iterations must be at least 1, got {self.iterations}")
        if not 0 < self.p <= 1:
            raise UserError(f"hqq: p lies above 0 and not above 1, got {self.p}")
        if not (self.beta > 0 and self.kappa > 0):
            raise UserError(f"hqq: beta and kappa must be positive, got {self.beta} and {self.kappa}")

    @property
    def fits(self) -> bool:
        return True

    @property
    def nearest_codes(self) -> bool:
        return True

    @property
    def requires(self) -> frozenset[str]:
        return frozenset()

    def check(self, format: Format) -> None:
        """Raise UserError where the format has no offset to fit, or no single levels to shift by it."""

        def offset(w: Array) -> Array | None:
            return format.columns(format.fit(w), w.shape)[-1]

        one = jax.ShapeDtypeStruct((format.rows or 1, format.block or 256), jnp.float32)
        if format.tile != (1, 1) or jax.eval_shape(offset, one) is None:
            raise UserError(f"hqq: {format.name} has no offset to fit; take an affine format such as uint4_g64_zf16")

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        self.check(format)
        w = state.target
        start = format.fit(w)
        s, m = format.columns(start, w.shape)
        x = grouped(w, s)

        def error(scales: Scales) -> Array:
            off = w - format.decode(scales, format.nearest(scales, w))
            return jnp.sum(jnp.abs(grouped(off, s)) ** self.p, axis=-1)

        def step(i: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, best, least = now
            m = proximal(x, s, m, partial(level, format), self.p, self.beta * self.kappa ** i.astype(jnp.float32))
            found = error(format.store(start, (s, m)))
            return m, jnp.where(found < least, m, best), jnp.minimum(found, least)

        _, best, _ = lax.fori_loop(0, self.iterations, step, (m, m, error(start)))
        scales = format.store(start, (s, best))
        return dataclasses.replace(state, scales=scales, codes=format.nearest(scales, w))


def hqq(iterations: int = 20, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01) -> HQQ:
    """A first stage without data: fits the offsets in an l_p norm, takes the nearest codes.

    Args:
      iterations: turns of errors and offsets; the best is kept, group by group.
      p: of the norm, above 0 and at most 1.
      beta: weight of the coupling of e to w - w_hat at the start, in units of the weights.
      kappa: what beta is multiplied by in each turn.
    """
    return HQQ(iterations, p, beta, kappa)


def shrink(x: Float[Array, "*x"], p: float, beta: float | Float[Array, ""]) -> Float[Array, "*x"]:
    """sign(x) max(|x| - |x|^(p - 1) / beta, 0), the paper's proximal step of |x|^p."""
    size = jnp.abs(x)
    return jnp.sign(x) * jnp.maximum(size - size ** (p - 1) / beta, 0.0)


def proximal(
    x: Float[Array, "rows G size"],
    s: Float[Array, "rows G"],
    m: Float[Array, "rows G"],
    level: Callable[[Array], Array],
    p: float,
    beta: float | Float[Array, ""],
) -> Float[Array, "rows G"]:
    """One turn: m <- mean(x - e - s T) with e = shrink(x - s T - m), T = level((x - m) / s)."""
    off = x - s[..., None] * level(units(x, s, m))
    return jnp.mean(off - shrink(off - m[..., None], p, beta), axis=-1)
