"""Scales and zeros of integer groups: min-max, or searched; f16, bf16, f32, or integers of a few bits under an f16.

    symmetric   w_hat = s T             s = max(high / T_max, low / T_min), or absmax / (T_max + 1/2) ("half", mid-rise)
    affine      w_hat = s (q - z)       s = (high - low) / q_max,  z = -low / s, rounded where it is an integer

Searches: least squares over many candidates (integer_search.py), stored, polished, and the neighbours of a nested scale
tried; each step is kept where the error as stored falls.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax.numpy as jnp
from jax import lax

from qjax.formats import integer_search as search
from qjax.formats.grid import Scaling
from qjax.formats.levels import Integers
from qjax.formats.protocol import Scales
from qjax.formats.storage import FLOATS, over, quotient, stored
from qjax.formats.stores import Multiple, Stored
from qjax.typing import Array, Float, Integer

_POLISH = 3  # rounds of (nearest codes, least-squares scale) after the search; more change nothing measurable


@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales as integers of `bits` bits under one f16 for `groups` groups; 0: for the row."""

    bits: int
    groups: int = 0

    def __str__(self) -> str:
        return f"u{self.bits}x{self.groups or 'row'}"

    @property
    def high(self) -> int:
        return 2**self.bits - 1


@dataclasses.dataclass(frozen=True)
class IntegerScales(Scaling):
    """{"scale": f32[*b, G]}, or nested {"scale": u8[*b, G], "super": f32[*b, G / S]}; {"zero": f32[*b, G]} if affine.

    Attributes:
      group: weights that share a scale; 0: the row.
      store_as: f16, bf16, f32, or nested.
      zero_kind: "none" (symmetric), "int", "f16" or "bf16".
      search: "absmax", "half" or "mse".
    """

    group: int
    store_as: str | Nested
    zero_kind: Literal["none", "int", "f16", "bf16"]
    search: Literal["absmax", "half", "mse"]
    high: int

    @property
    def block(self) -> int:
        return self.group * (self.store_as.groups or 1 if isinstance(self.store_as, Nested) else 1)

    @property
    def signed(self) -> bool:
        return False

    @property
    def free(self) -> bool:
        """Zeros are floats."""
        return self.zero_kind in FLOATS

    @property
    def scale(self) -> Stored | Multiple:
        if isinstance(self.store_as, Nested):
            return Multiple("scale", "super", 0, self.store_as.high)
        return Stored("scale", self.store_as)

    @property
    def zero(self) -> Stored | None:
        if self.zero_kind == "none":
            return None
        whole = partial(_whole, high=self.high)
        return Stored("zero", self.zero_kind if self.free else whole, near=())

    def nearest(self, levels: Integers, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        """Integer zeros are added to the rounded quotient, as in GPTQ, and float ones to the quotient."""
        if self.zero_kind != "int":
            return super().nearest(levels, scales, w)
        s, z = self.scale.get(scales)[..., None], scales["zero"][..., None]
        u = over(self.grouped(scales, w), s)
        return levels.round(jnp.round(u) + z)[1].reshape(w.shape)

    def fit(self, levels: Integers, w: Array, weight: Array | None) -> Scales:
        x, h = (None if a is None else a.reshape(*a.shape[:-1], -1, self.group or a.shape[-1]) for a in (w, weight))
        assert x is not None
        s, m = self._span(levels, x)
        best = self._put(s, m)
        if self.search != "mse":
            return best
        s, m = self._searched(levels, x, h, s, m)
        nested = isinstance(self.store_as, Nested)
        for spare in range(3 if nested else 1):
            best = self._better(levels, x, h, best, self._put(s, m, spare))

        def polish(best: Scales, _: None) -> tuple[Scales, None]:
            return self._better(levels, x, h, best, self._put(*self._refitted(levels, x, h, best))), None

        best, _ = lax.scan(polish, best, None, length=_POLISH)
        for move in (-1, 1) if nested else ():
            best = self._nudged(levels, x, h, best, move)
        return best

    def _span(self, levels: Integers, x: Array) -> tuple[Array, Array]:
        """Scale and value of code 0 that clip nothing, before they are stored."""
        low, high = x.min(axis=-1), x.max(axis=-1)
        half = 2.0 ** (levels.bits - 1)
        if levels.half or self.search == "half":
            return quotient(jnp.maximum(high, -low), half - 0.5), jnp.zeros_like(low)
        if self.zero_kind == "none":
            return jnp.maximum(quotient(high, half - 1), -low * (1 / half)), jnp.zeros_like(low)
        if not self.free:
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        s = quotient(high - low, levels.high)
        if self.free:  # a narrow group far from 0: |z| needs at most the digits its type has
            s = jnp.maximum(s, jnp.maximum(high, -low) * 2.0 ** -(11 if self.zero_kind == "f16" else 8))
        return s, low

    def _put(self, s: Array, m: Array, spare: int = 0) -> Scales:
        """s and m as stored, zeros for the stored scale; a super-scale gives the largest the top code less `spare`."""
        if isinstance(self.store_as, Nested):
            units = s.reshape(*s.shape[:-1], -1, self.store_as.groups or s.shape[-1])
            top = stored(quotient(units.max(axis=-1), self.store_as.high - spare), "f16")
            codes = jnp.round(quotient(units, jnp.where(top > 0, top, 1.0)[..., None]))
            codes = jnp.clip(codes, jnp.where(units > 0, 1.0, 0.0), self.store_as.high)
            scales = {"scale": codes.astype(jnp.uint8).reshape(s.shape), "super": top}
        else:
            scales = self.scale.put({}, s)
        return scales if self.zero is None else scales | self.zeros(scales, m)

    def _searched(self, levels: Integers, x: Array, h: Array | None, s: Array, m: Array) -> tuple[Array, Array]:
        low = min(0.1 * 1.4 ** (levels.bits - 2), 0.75)  # the fewer the levels, the more it pays to clip
        if self.zero_kind == "none":
            return search.search_scale(x, h, lambda u: levels.round(u)[0], s, low), m
        return search.search_range(x, h, m, m + s * levels.high, levels.high, self.free, low)

    def _refitted(self, levels: Integers, x: Array, h: Array | None, scales: Scales) -> tuple[Array, Array]:
        """Least squares for the codes that `scales` lead to."""
        s, m = self.columns(scales, x.shape[:-1])
        T = levels.value(self._codes(levels, scales, x))
        if self.free:
            slope, offset, _ = search.line(x, h, T)
            assert m is not None
            return jnp.where(slope > 0, slope, s), jnp.where(slope > 0, offset, m)
        if m is None:
            return search.fitted_scale(x, h, T, s), jnp.zeros_like(s)
        fitted = search.fitted_scale(x, h, T - scales["zero"][..., None], s)
        return fitted, -fitted * scales["zero"]

    def _better(self, levels: Integers, x: Array, h: Array | None, a: Scales, b: Scales) -> Scales:
        """Of two sets of scales the one with less error, for each set of groups under one super-scale."""
        unit = (self.store_as.groups or x.shape[-2]) if isinstance(self.store_as, Nested) else 1
        better = self._error(levels, x, h, b, unit) < self._error(levels, x, h, a, unit)  # [*b, G / unit]
        each = jnp.repeat(better, unit, axis=-1)
        return {k: jnp.where(better if k == "super" else each, b[k], a[k]) for k in a}

    def _nudged(self, levels: Integers, x: Array, h: Array | None, best: Scales, move: int) -> Scales:
        """Each group's own scale code moved, where that lowers the error."""
        assert isinstance(self.store_as, Nested)
        m = self.columns(best, x.shape[:-1])[1]
        codes = jnp.clip(best["scale"].astype(jnp.int32) + move, 0, self.store_as.high)
        moved = {**best, "scale": codes.astype(jnp.uint8)}
        moved = moved if m is None else moved | self.zeros(moved, m)
        better = self._error(levels, x, h, moved, 1) < self._error(levels, x, h, best, 1)
        return {k: best[k] if k == "super" else jnp.where(better, moved[k], best[k]) for k in best}

    def _codes(self, levels: Integers, scales: Scales, x: Array) -> Array:
        return self.nearest(levels, scales, x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def _error(self, levels: Integers, x: Array, h: Array | None, scales: Scales, unit: int) -> Array:
        x_hat = self.weights(scales, levels.value(self._codes(levels, scales, x)))
        joined = None if h is None else _joined(h, unit)
        return search.weighted_error(_joined(x, unit), joined, _joined(x_hat, unit))


def _whole(z: Array, high: int) -> Array:
    return jnp.clip(jnp.round(z), 0, high)


def _joined(x: Array, unit: int) -> Array:
    """[*b, G, g] -> [*b, G / unit, unit g]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // unit, unit * x.shape[-1])
