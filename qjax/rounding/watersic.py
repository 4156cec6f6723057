"""WaterSIC: feedback onto integers whose spacing is each column's own; their rate is an entropy.

    H + lambda diag(H) = L L^T        s_j = c / L_jj        z = LDLQ(W) on s_j Z        w_hat = s z

Behind feedback column j costs L_jj^2 s_j^2 / 12 = c^2 / 12 a row, whatever j: the distortion of water filling at high
resolution, where the rate of a column is h(w_j) - log2 s_j. Both together lie log2(2 pi e / 12) / 2 = 0.2546 bits above
the rate-distortion function of normal weights, for every H; equal spacings, GPTQ's, may lie as far above it as H likes.
c is found by halving, for a mean rate that is asked for.

Source: WaterSIC, arXiv:2603.04956, its spacing and feedback; not its shrinkage, its rescaling of rows and columns, nor
its drift term.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Scales
from qjax.formats.spaced import SPACED
from qjax.formats.storage import stored
from qjax.rounding.curvature import Factor, ordered
from qjax.rounding.entropy import coded, entropy
from qjax.rounding.ldlq import fed_back
from qjax.rounding.protocol import DAMPING
from qjax.typing import Array, Float, Integer

_HALVINGS = 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EntropyCoded:
    """Integers and what they are worth.

    Attributes:
      scales, codes: of the format `SPACED`.
      rate, entropy: mean bits a weight, see entropy.py: what a coder takes, and what none goes below.
      column_rate: `rate` of each column, f32[n].
      damping: lambda used; NaN: H was too indefinite, and the result is not to be used.
    """

    scales: Scales
    codes: Integer[Array, "rows n"]
    rate: Float[Array, ""]
    entropy: Float[Array, ""]
    column_rate: Float[Array, "n"]
    damping: Float[Array, ""]

    @property
    def w_hat(self) -> Float[Array, "rows n"]:
        """The weight."""
        return SPACED.decode(self.scales, self.codes)


def watersic(
    w: Float[Array, "rows n"],
    H: Float[Array, "n n"],
    bits: float,
    spacing: Literal["water", "equal"] = "water",
    damping: float = DAMPING,
) -> EntropyCoded:
    """A weight as integers of a mean rate; jittable.

    Args:
      w: rows (out, in).
      H: E[x x^T].
      bits: the rate asked for, `coded`'s with what is told of columns; more than that takes.
      spacing: "water" c / L_jj; "equal" c, GPTQ's, to compare with.
      damping: lambda of H + lambda diag(H), at least.

    Raises:
      UserError: bits that no spacing gives, or another word for it.
    """
    if spacing not in ("water", "equal") or not 0 < bits <= 12:
        raise UserError(f"watersic: spacing is water or equal, bits above 0 and at most 12; got {spacing!r}, {bits}")
    f = ordered(H, damping, "natural", 1, 1)
    size = jnp.diagonal(f.c) if spacing == "water" else jnp.ones(len(f.c))
    inverse = jnp.zeros_like(size).at[f.order].set(1.0 / size)
    rms = jnp.sqrt(jnp.mean(w * w))
    unit = rms / jnp.exp(jnp.mean(jnp.log(inverse)))  # s has the weight's size in the mean where c is 1

    def rate(log_c: Array) -> Array:
        return jnp.mean(coded(_rounded(w, f, jnp.exp2(log_c) * unit * inverse)[1]))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        above = rate(middle) > bits
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    ends = jnp.float32(-bits), jnp.float32(4.0)
    _, log_c = lax.fori_loop(0, _HALVINGS, halve, ends)
    scales, codes = _rounded(w, f, jnp.exp2(log_c) * unit * inverse)
    by_column = coded(codes)
    return EntropyCoded(scales, codes, jnp.mean(by_column), jnp.mean(entropy(codes)), by_column, f.damping)


def _rounded(w: Array, f: Factor, s: Array) -> tuple[Scales, Array]:
    """Feedback onto s_j Z, the spacings as they are stored."""
    least = 2.0**-24  # of fp16
    scales: Scales = {"s": jnp.maximum(stored(s, "f16"), least)[None, :]}
    return scales, fed_back(SPACED, w, SPACED.columns(scales, w.shape), f)[1]
