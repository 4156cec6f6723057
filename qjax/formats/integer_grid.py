"""The integer format itself: w_hat = s (q - z) over groups; `qjax.formats.integer` names and makes its members.

Leaves, for weights [*b, n] in G = n / g groups (G = 1 for rows); sub-byte codes are the little-endian bit stream of
`bits.pack_bits`, symmetric ones offset by 2^(b-1):

    codes   u8[*b, G, g b / 8]
    scale   f16 | bf16 | f32 [*b, G],  or the k-bit stream u8[*b, ceil(G k / 8)] with
    super   f16[*b, G / S]
    zero    the b-bit stream u8[*b, ceil(G b / 8)],  or f16 | bf16 [*b, G]

A stream of scales or zeros is padded to a whole byte at the row's end; `bits_per_weight` leaves that padding out.
"""

from __future__ import annotations

import dataclasses
import math
import re

import jax.numpy as jnp
from jax import lax

from qjax.chain import Link
from qjax.errors import UserError
from qjax.formats import integer_search as search
from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import FLOATS, quotient, stored
from qjax.typing import Array, Float, Integer

_POLISH = 3  # rounds of (nearest codes, least-squares scale) after the search; more change nothing measurable


@dataclasses.dataclass(frozen=True)
class IntegerFormat(Link):
    """A frozen record of the format's parameters; `qjax.formats.integer.affine` documents them and has the defaults."""

    bits: int
    group: int
    symmetric: bool
    scale: str
    zero: str
    levels: str
    search: str

    def __post_init__(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise UserError(f"integer format: {message}")

        check(self.bits in range(2, 9), f"bits must be 2 to 8, got {self.bits}")
        check(
            self.group >= 0 and self.group * self.bits % 8 == 0,
            f"a group of {self.group} codes of {self.bits} bits does not end on a byte; make it a multiple of 8",
        )
        nested = _nested(self.scale)
        check(
            nested is not None or self.scale in FLOATS,
            f"scale must be f16, bf16, f32 or u<2-8>x<groups|row>, got {self.scale!r}",
        )
        check(nested is None or self.group > 0, "a row has one scale: nothing to nest under a super-scale")
        zeros = ("none",) if self.symmetric else ("int", "f16", "bf16")
        kind = "a symmetric" if self.symmetric else "an affine"
        check(self.zero in zeros, f"{kind} format has zero {' or '.join(zeros)}, got {self.zero!r}")
        check(
            self.levels in ("mid-tread", "mid-rise"),
            f"levels must be mid-tread or mid-rise, got {self.levels!r}",
        )
        check(self.symmetric or self.levels == "mid-tread", "mid-rise levels are symmetric")
        check(
            self.search in ("absmax", "half", "mse"),
            f"search must be absmax, half or mse, got {self.search!r}",
        )
        check(
            self.search != "half" or (self.symmetric and self.levels == "mid-tread"),
            "search 'half' is for symmetric mid-tread levels; elsewhere it would be absmax",
        )

    @property
    def name(self) -> str:
        parts = [f"{'' if self.symmetric else 'u'}int{self.bits}", f"g{self.group}" if self.group else "row"]
        parts += ["mid"] * (self.levels == "mid-rise") + [self.search] * (self.search != "absmax")
        parts += [self.scale] * (self.scale != "f16") + [f"z{self.zero}"] * (self.zero in FLOATS)
        return "_".join(parts)

    @property
    def block(self) -> int:
        return self.group * (self._nested[1] or 1 if self._nested else 1)

    @property
    def tile(self) -> int:
        return 1

    @property
    def row_wise(self) -> bool:
        return True

    @property
    def about(self) -> str:
        scale = f"a {self.scale} scale" if self.scale[0] != "u" else f"nested scales ({self.scale})"
        words = [
            f"{self.bits}-bit {'symmetric' if self.symmetric else 'affine'} integers",
            f"{scale} per {self.group or 'row'}",
            "" if self.zero in ("none", "int") else f"{self.zero} zeros",
            "half-integer levels" if self.levels == "mid-rise" else "",
            "searched for least squared error" if self.search == "mse" else "",
        ]
        return ", ".join(filter(None, words))

    @property
    def bits_per_weight(self) -> float:
        if not self.group:
            return float(self.bits)
        zero = {"none": 0, "int": self.bits}.get(self.zero, 16)
        if self._nested is None:
            return self.bits + (8 * jnp.dtype(FLOATS[self.scale]).itemsize + zero) / self.group
        k, groups = self._nested
        return self.bits + (k + zero) / self.group + (16 / (self.group * groups) if groups else 0)

    @property
    def _nested(self) -> tuple[int, int] | None:
        return _nested(self.scale)

    @property
    def _low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def _high(self) -> int:
        return self._low + 2**self.bits - 1

    @property
    def _free(self) -> bool:
        return self.zero in FLOATS

    # scales

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        x = self._groups(w)
        s, m = self._span(x)
        best = self._stored(s, m)
        if self.search != "mse":
            return best
        h = None if weight is None else self._groups(weight)
        s, m = self._searched(x, h, s, m)
        for spare in range(3 if self._nested else 1):
            best = self._better(x, h, best, self._stored(s, m, spare))

        def polish(best: Scales, _: None):
            return self._better(x, h, best, self._stored(*self._refitted(x, h, best))), None

        best, _ = lax.scan(polish, best, None, length=_POLISH)
        if self._nested:
            for move in (-1, 1):
                best = self._nudged(x, h, best, move, 2 ** self._nested[0] - 1)
        return best

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        codes = self._codes(scales, self._groups(w)).reshape(w.shape)
        return codes.astype(jnp.int8 if self.symmetric else jnp.uint8)

    def decode(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        return self._values(scales, self._groups(codes)).reshape(codes.shape)

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b n"]]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    # storage

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        s, m = self._step_and_offset(scales)
        return s, None if self.symmetric else m

    def level(self, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        return self._level(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        m = self._step_and_offset(scales)[1] if m is None else m
        if not self._nested:
            return self._stored(jnp.maximum(s, 0.0), m)
        k, groups = self._nested
        top = scales["super"]
        units = s.reshape(*s.shape[:-1], -1, groups or s.shape[-1])
        codes = jnp.clip(jnp.round(quotient(units, jnp.where(top > 0, top, 1.0)[..., None])), 0, 2**k - 1)
        return self._with_zero({"scale": codes.astype(jnp.uint8).reshape(s.shape), "super": top}, m)

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        offset = (self._groups(codes).astype(jnp.int32) - self._low).astype(jnp.uint8)
        leaves = {"codes": pack_bits(offset, self.bits)}
        if self._nested:
            leaves["scale"] = _pack_padded(scales["scale"], self._nested[0])
            leaves["super"] = scales["super"].astype(jnp.float16)
        else:
            leaves["scale"] = scales["scale"].astype(FLOATS[self.scale])
        if self.zero == "int":
            leaves["zero"] = _pack_padded(scales["zero"].astype(jnp.uint8), self.bits)
        elif self._free:
            leaves["zero"] = scales["zero"].astype(FLOATS[self.zero])
        return leaves

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        codes = unpack_bits(leaves["codes"], self.bits).astype(jnp.int32) + self._low
        codes = codes.astype(jnp.int8 if self.symmetric else jnp.uint8)
        groups = codes.shape[-2]
        if self._nested:
            scales = {
                "scale": _unpack_padded(leaves["scale"], self._nested[0], groups),
                "super": leaves["super"].astype(jnp.float32),
            }
        else:
            scales = {"scale": leaves["scale"].astype(jnp.float32)}
        if self.zero == "int":
            scales["zero"] = _unpack_padded(leaves["zero"], self.bits, groups).astype(jnp.float32)
        elif self._free:
            scales["zero"] = leaves["zero"].astype(jnp.float32)
        return scales, codes.reshape(*codes.shape[:-2], groups * codes.shape[-1])

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, groups, size = leaves["codes"].shape
        return (*lead, groups * (size * 8 // self.bits))

    # pieces, on groups [*b, G, g]

    def _groups(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.group or x.shape[-1])

    def _span(self, x: Array) -> tuple[Array, Array]:
        """Scale and value of code 0 that clip nothing, before rounding to storage."""
        low, high = x.min(axis=-1), x.max(axis=-1)
        half = 2.0 ** (self.bits - 1)
        if self.levels == "mid-rise" or self.search == "half":
            return quotient(jnp.maximum(high, -low), half - 0.5), jnp.zeros_like(low)
        if self.symmetric:
            return jnp.maximum(quotient(high, half - 1), -low * (1 / half)), jnp.zeros_like(low)
        if not self._free:
            low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        s = quotient(high - low, self._high)
        if self._free:  # a narrow group far from 0: |z| needs at most the digits its type has
            s = jnp.maximum(s, jnp.maximum(high, -low) * 2.0 ** -(11 if self.zero == "f16" else 8))
        return s, low

    def _searched(self, x: Array, h: Array | None, s: Array, m: Array) -> tuple[Array, Array]:
        low = min(0.1 * 1.4 ** (self.bits - 2), 0.75)  # the fewer the levels, the more it pays to clip
        if self.symmetric:
            return search.search_scale(x, h, self._level, s, low), m
        return search.search_range(x, h, m, m + s * self._high, self._high, self._free, low)

    def _refitted(self, x: Array, h: Array | None, scales: Scales) -> tuple[Array, Array]:
        """Least squares for the codes that `scales` lead to."""
        s, m = self._step_and_offset(scales)
        q = self._codes(scales, x).astype(jnp.float32)
        if self._free:
            slope, offset, _ = search.line(x, h, q)
            return jnp.where(slope > 0, slope, s), jnp.where(slope > 0, offset, m)
        zero = self._zero(scales)[..., None]
        fitted = search.fitted_scale(x, h, q - zero, s)
        return fitted, m if self.symmetric else -fitted * scales["zero"]

    def _stored(self, s: Array, m: Array, spare: int = 0) -> Scales:
        """Scales [*b, G] and values of code 0 as storage rounds them; zeros belong to the rounded scale. A super-scale
        gives the largest of its scales the largest code less `spare`."""
        if not self._nested:
            return self._with_zero({"scale": stored(s, self.scale)}, m)
        k, groups = self._nested
        units = s.reshape(*s.shape[:-1], -1, groups or s.shape[-1])
        top = stored(quotient(units.max(axis=-1), 2**k - 1 - spare), "f16")
        codes = jnp.round(quotient(units, jnp.where(top > 0, top, 1.0)[..., None]))
        codes = jnp.clip(codes, jnp.where(units > 0, 1.0, 0.0), 2**k - 1)
        scales = {"scale": codes.astype(jnp.uint8).reshape(s.shape), "super": top}
        return self._with_zero(scales, m)

    def _with_zero(self, scales: Scales, m: Array) -> Scales:
        if self.symmetric:
            return scales
        s = self._step(scales)
        z = jnp.where(s > 0, quotient(-m, jnp.where(s > 0, s, 1.0)), 0.0)
        return {**scales, "zero": stored(z, self.zero) if self._free else jnp.clip(jnp.round(z), 0, self._high)}

    def _step(self, scales: Scales) -> Array:
        """s of each group, f32[*b, G]."""
        if not self._nested:
            return scales["scale"]
        codes = scales["scale"].astype(jnp.float32)
        units = codes.reshape(*scales["super"].shape, -1) * scales["super"][..., None]
        return units.reshape(codes.shape)

    def _zero(self, scales: Scales) -> Array:
        """z of each group: [*b, G], or [1] where it is a constant."""
        if not self.symmetric:
            return scales["zero"]
        constant = -0.5 if self.levels == "mid-rise" else 0.0
        return jnp.full_like(self._step(scales), constant)

    def _step_and_offset(self, scales: Scales) -> tuple[Array, Array]:
        s = self._step(scales)
        return s, jnp.zeros_like(s) if self.symmetric else -s * scales["zero"]

    def _level(self, u: Array) -> Array:
        """The nearest level of the symmetric unit grid."""
        if self.levels == "mid-rise":
            return jnp.clip(jnp.floor(u), self._low, self._high) + 0.5
        return jnp.clip(jnp.round(u), self._low, self._high)

    def _codes(self, scales: Scales, x: Array) -> Array:
        s = self._step(scales)[..., None]
        u = jnp.where(s > 0, quotient(x, jnp.where(s > 0, s, 1.0)), 0.0)
        if self.levels == "mid-rise":
            q = jnp.floor(u)
        elif self._free:
            q = jnp.round(u + scales["zero"][..., None])
        else:
            q = jnp.round(u) + self._zero(scales)[..., None]
        return jnp.clip(q, self._low, self._high).astype(jnp.int32)

    def _values(self, scales: Scales, codes: Array) -> Array:
        # (q - z) first: one rounding each, and no s q - s z for a compiler to fuse
        return self._step(scales)[..., None] * (codes.astype(jnp.float32) - self._zero(scales)[..., None])

    def _better(self, x: Array, h: Array | None, a: Scales, b: Scales) -> Scales:
        """Of two sets of scales the one with less error, for each set of groups under one super-scale."""
        unit = (self._nested[1] or x.shape[-2]) if self._nested else 1
        better = self._error(x, h, b, unit) < self._error(x, h, a, unit)  # [*b, G / unit]
        each = jnp.repeat(better, unit, axis=-1)
        return {k: jnp.where(better if k == "super" else each, b[k], a[k]) for k in a}

    def _nudged(self, x: Array, h: Array | None, best: Scales, move: int, top: int) -> Scales:
        """Each group's own scale code moved, where that lowers the error."""
        codes = jnp.clip(best["scale"].astype(jnp.int32) + move, 0, top)
        moved = self._with_zero({**best, "scale": codes.astype(jnp.uint8)}, self._step_and_offset(best)[1])
        better = self._error(x, h, moved, 1) < self._error(x, h, best, 1)
        return {k: best[k] if k == "super" else jnp.where(better, moved[k], best[k]) for k in best}

    def _error(self, x: Array, h: Array | None, scales: Scales, unit: int) -> Array:
        x_hat = self._values(scales, self._codes(scales, x))
        joined = None if h is None else _joined(h, unit)
        return search.weighted_error(_joined(x, unit), joined, _joined(x_hat, unit))


def _joined(x: Array, unit: int) -> Array:
    """[*b, G, g] -> [*b, G / unit, unit g]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] // unit, unit * x.shape[-1])


def _nested(scale: str) -> tuple[int, int] | None:
    """(k, S) of "u<k>x<S>"; S = 0 for the row."""
    found = re.fullmatch(r"u([2-8])x([1-9]\d*|row)", scale)
    return found and (int(found[1]), 0 if found[2] == "row" else int(found[2]))


def _pack_padded(codes: Array, bits: int) -> Array:
    """`pack_bits` of a stream padded with zeros to a whole byte: u8[*b, ceil(count bits / 8)]."""
    size = math.ceil(codes.shape[-1] * bits / 8)
    return pack_bits(_padded(codes, 8 // math.gcd(8, bits)), bits)[..., :size]


def _unpack_padded(stream: Array, bits: int, count: int) -> Array:
    """The inverse of `_pack_padded`."""
    return unpack_bits(_padded(stream, bits // math.gcd(8, bits)), bits)[..., :count]


def _padded(x: Array, multiple: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])
