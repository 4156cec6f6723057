"""Rounding the inputs too: W8A8, FP8 on both sides, W4A8. The last member of a chain, and the only one that is not
exact.

    x_hat = s q(x / s)      s = max|x| / q_max, per token, or from calibration        y = W' x_hat

Integer inputs meet integer weights in int32 (`product`), as the hardware does it. With a threshold (LLM.int8(),
arXiv:2208.07339) channels where any |x| reaches it are multiplied in floating point, the others as integers.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.float8 import nearest_float
from qjax.formats.grid import Grid
from qjax.formats.levels import Integers
from qjax.formats.protocol import Format, Scales
from qjax.formats.storage import quotient
from qjax.reparam.protocol import Applied, Reparam, Site, statistic
from qjax.typing import Array, Float

Kind = Literal["int8", "int4", "e4m3", "e5m2"]
_LARGEST = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0, "e5m2": 57344.0}
_FLOATS = {"e4m3": "E4M3", "e5m2": "E5M2"}


@partial(jax.tree_util.register_dataclass, data_fields=("top",), meta_fields=("kind", "threshold"))
@dataclasses.dataclass(frozen=True)
class RoundedInput(Applied):
    """`top`: the largest |x| expected, f32[]; None: of each token."""

    top: Any
    kind: Kind = "int8"
    threshold: float | None = None

    @property
    def rounds_input(self) -> bool:
        return True

    def input(self, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        codes, s, exact = self.parts(x)
        return (exact + codes.astype(jnp.float32) * s).astype(x.dtype)

    def parts(self, x: Float[Array, "*b n"]) -> tuple[Array, Array, Array]:
        """x_hat = exact + s codes: codes [*b, n] in the kind's own type, s f32[*b, 1], exact f32[*b, n] or 0.

        A token with NaN or Inf has the scale NaN.
        """
        x = x.astype(jnp.float32)
        exact = jnp.zeros((), jnp.float32)
        if self.threshold is not None:
            most = jnp.max(jnp.abs(x), axis=tuple(range(x.ndim - 1)), keepdims=True, initial=0.0)
            outlier = most >= self.threshold
            exact, x = jnp.where(outlier, x, 0.0), jnp.where(outlier, 0.0, x)
        largest = _LARGEST[self.kind]
        top = jnp.max(jnp.abs(x), axis=-1, keepdims=True) if self.top is None else self.top
        s = jnp.where(top > 0, quotient(top, largest), 1.0)
        u = jnp.clip(quotient(x, s), -largest, largest)
        codes = nearest_float(u, _FLOATS[self.kind]) if self.kind in _FLOATS else jnp.round(u).astype(jnp.int8)
        finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)  # integers have no NaN to show
        return codes, jnp.where(finite, s, jnp.nan), exact

    def product(
        self, x: Float[Array, "*b n"], format: Format, scales: Scales, w: Float[Array, "out n"]
    ) -> Float[Array, "*b out"]:
        """W x_hat; where both are integers, accumulated in int32 within each group of weights."""
        levels = format.levels if isinstance(format, Grid) else None
        if not isinstance(levels, Integers) or levels.half or self.kind in _FLOATS:
            return _float(self.input(x.astype(jnp.float32)), w)
        codes, s_x, exact = self.parts(x)
        s, m = format.columns(scales, w.shape)
        offset = jnp.zeros_like(s) if m is None else m
        if levels.high > 127:  # 0..255 does not fit an int8
            offset = offset + 128.0 * s
        wide, groups = w.reshape(w.shape[0], s.shape[1], -1), s.shape[1]
        T = (wide - offset[..., None]) / jnp.where(s == 0, 1.0, s)[..., None]
        T = jnp.round(jnp.where(s[..., None] == 0, 0.0, T)).astype(jnp.int8)
        q = codes.reshape(*codes.shape[:-1], groups, wide.shape[2])
        b = codes.ndim - 1  # products by group: [G, *b, out]
        sums = lax.dot_general(q, T, (((b + 1,), (2,)), ((b,), (1,))), preferred_element_type=jnp.int32)
        y = jnp.einsum("g...o,og->...o", sums.astype(jnp.float32), s, precision="highest")
        if m is not None:
            total = jnp.sum(q.astype(jnp.int32), axis=-1).astype(jnp.float32)
            y = y + _float(total, offset)
        y = y * s_x
        return y if self.threshold is None else y + _float(exact, w)


@dataclasses.dataclass(frozen=True)
class Act(Reparam):
    """See `act`."""

    kind: Kind = "int8"
    scale: Literal["token", "tensor"] = "token"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _LARGEST:
            raise UserError(f"act: kind is one of {', '.join(_LARGEST)}, got {self.kind!r}")
        if self.scale not in ("token", "tensor"):
            raise UserError(f"act: scale is token or tensor, got {self.scale!r}")
        if self.threshold is not None and not self.threshold > 0:
            raise UserError(f"act: threshold must be positive, got {self.threshold}")

    @property
    def name(self) -> str:
        return "act"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"absmax"} if self.scale == "tensor" else ())

    def __call__(self, site: Site) -> tuple[Site, RoundedInput]:
        top = None
        if self.scale == "tensor":
            top = jnp.max(statistic(site.stats, "absmax", "act(scale='tensor')"))
        return site, RoundedInput(top, self.kind, self.threshold)


def act(kind: Kind = "int8", scale: Literal["token", "tensor"] = "token", threshold: float | None = None) -> Act:
    """Round the inputs as well. Stands last among the reparametrizations.

    Statistics do not know of it: H is that of the unrounded input, and reported losses are the weight's alone.

    Args:
      kind: int8, int4, e4m3 or e5m2.
      scale: of each token as it comes ("token"), or one from the calibration's max|x| ("tensor").
      threshold: channels where any |x| of the batch reaches it are multiplied in floating point; None: none are.
    """
    return Act(kind, scale, threshold)


def _float(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)
