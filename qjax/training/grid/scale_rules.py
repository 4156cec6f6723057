"""Where scales come from, if not from the format's own fit: rules of the training literature, on any format they suit.

    own        the format's `encode`, as `qjax.quantize` runs it
    absmax     s = max |w| / hi, hi the largest level                      ParetoQ's start for 3 and 4 bits
    seq        s = max |w| / (hi + 1/2): the ends of the outer cells       ParetoQ, arXiv:2502.02631, section 3
    lsq        s = 2 mean |w| / sqrt(hi)                                   LSQ, arXiv:1902.08153, section 2.1
    absmean    s = mean |w|                                                BitNet b1.58, arXiv:2402.17764, equation 3
    rms        s = 2 c rms(w) / (K - 1), K levels, c the half range        QuEST, arXiv:2502.05003, section 3.1
               of least squared error for Gaussian weights
    twn        T = sign(w) where |w| > D = 0.7 mean |w|;                   ternary weight networks, arXiv:1605.04711,
               s = mean of |w| over those                                  section 2.2

A rule gives s, and twn the threshold scale p = 2 D as well (levels change at p / 2): the value of a level and the point
where it begins are two numbers, and one for both costs 39 % more error on Gaussian weights. `per` says who shares them:
a group of the format, or the whole matrix, whose one value is then stored in each of its groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats.protocol import Format
from qjax.rounding.ranges import ends, level
from qjax.training.grid.learned_grid import GridArrays
from qjax.typing import Array, Float

Kind = Literal["own", "absmax", "seq", "lsq", "absmean", "rms", "twn"]
KINDS = ("own", "absmax", "seq", "lsq", "absmean", "rms", "twn")
Per = Literal["group", "matrix"]

# Levels: half range in units of rms.
_HALF_RANGE = {2: 0.798, 3: 1.224, 4: 1.494, 8: 2.051, 16: 2.514, 32: 2.916, 64: 3.277, 256: 3.885}


@dataclasses.dataclass(frozen=True)
class ScaleRule:
    """See the module's docstring."""

    kind: Kind = "own"
    per: Per = "group"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown scale rule {self.kind!r}; known: {', '.join(KINDS)}")
        if self.per not in ("group", "matrix"):
            raise UserError(f"a scale rule is per group or per matrix, got {self.per!r}")

    def __call__(self, fmt: Format, x: Float[Array, "*b n"]) -> GridArrays:
        """s and maybe p for weights x, f32[*b, G] each, G the groups of the format's grid.

        Raises:
          UserError: `own`, which is the format's; a rule that the format's levels do not suit.
        """
        count, hi, even, symmetric = _levels(fmt)
        if self.kind == "twn" and count != 3:
            raise UserError(f"the rule twn is for three levels; {fmt.name} has {count}")
        if self.kind == "rms" and not (even and symmetric and count in _HALF_RANGE):
            raise UserError(f"the rule rms is for {', '.join(map(str, _HALF_RANGE))} even levels, not {fmt.name}'s")
        steps, offsets = jax.eval_shape(lambda x: fmt.columns(fmt.fit(x), x.shape), x)
        if offsets is not None:
            raise UserError(
                f"the rule {self.kind} gives scales alone, and {fmt.name} has offsets too; take its own fit"
            )
        groups = steps.shape
        size = jnp.abs(x).reshape(*groups, -1)
        match self.kind:
            case "absmax":
                return {"s": self._over(jnp.max, size) / hi}
            case "seq":
                return {"s": self._over(jnp.max, size) / (hi + 0.5)}
            case "lsq":
                return {"s": self._over(jnp.mean, size) * (2 / math.sqrt(hi))}
            case "absmean":
                return {"s": self._over(jnp.mean, size)}
            case "rms":
                return {"s": jnp.sqrt(self._over(jnp.mean, size * size)) * (2 * _HALF_RANGE[count] / (count - 1))}
            case "twn":
                border = 0.7 * self._over(jnp.mean, size)
                large = (size > border[..., None]).astype(jnp.float32)
                share = self._over(jnp.mean, large)
                mean = self._over(jnp.mean, size * large) / jnp.where(share > 0, share, 1.0)
                return {"s": mean, "p": 2 * border}
        raise UserError("the rule `own` is the format's own encode")

    def _over(self, statistic: Callable[..., Array], size: Float[Array, "*b G g"]) -> Float[Array, "*b G"]:
        axes = (-1,) if self.per == "group" else tuple(range(-min(size.ndim, 3), 0))
        value = statistic(size, axis=axes, keepdims=True)
        return jnp.broadcast_to(value, (*size.shape[:-1], 1))[..., 0]


OWN = ScaleRule()


def _levels(fmt: Format) -> tuple[int, float, bool, bool]:
    """How many levels there are, the largest, whether they lie one apart, and evenly around 0."""
    with jax.ensure_compile_time_eval():
        lo, hi = (float(end) for end in ends(fmt))
        levels = np.unique(np.asarray(level(fmt, jnp.linspace(lo, hi, 4097, dtype=jnp.float32))))
        return levels.size, hi, bool(np.all(np.diff(levels) == 1)), lo == -hi
