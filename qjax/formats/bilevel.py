"""Integers whose group scales and zeros are themselves affine codes: SpQR's bilevel quantization.

    w_hat = s (q - z)        q in [0, 2^b - 1]
    s = a_s + d_s q_s        z = a_z + d_z q_z        q_s, q_z in [0, 2^k - 1];  a, d: f16, one of each per S groups

    uint<b>_g<g>_bilevel<k>x<S>        uint3_g16_bilevel3x16: 3 + (3 + 3) / 16 + 64 / 256 = 3.625 bits

A group's range is min-max and includes 0, as in GPTQ, so that z lies in [0, 2^b - 1]. The S groups lie one after
another in a row, so that a row can be rounded without the others; the paper's are the same group of S rows, of equal
size. Zeros are found for the scales as stored.

Leaves, for weights [*b, n] in G = n / g groups:

    codes         the b-bit stream u8[*b, G, g b / 8]
    scale, zero   the k-bit streams u8[*b, G / S, S k / 8]
    second        f16[*b, G / S, 4]: a_s, d_s, a_z, d_z

Source: SpQR, arXiv:2306.03078, section 4.1 (bilevel quantization).
"""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp

from qjax.chain import Link
from qjax.errors import UserError
from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import quotient, stored
from qjax.typing import Array, Float, Integer


@dataclasses.dataclass(frozen=True)
class Bilevel(Link):
    """A frozen record of the format's parameters.

    Attributes:
      bits: of a weight's code, 2 to 8.
      group: weights that share a scale and a zero.
      second: bits of a scale's and of a zero's code, 2 to 8.
      groups: groups that share a second level.
    """

    bits: int = 3
    group: int = 16
    second: int = 3
    groups: int = 16

    def __post_init__(self) -> None:
        for what, bits, count in (("group", self.bits, self.group), ("second level", self.second, self.groups)):
            if bits not in range(2, 9):
                raise UserError(f"bilevel format: codes have 2 to 8 bits, got {bits}")
            if count <= 0 or count * bits % 8:
                raise UserError(
                    f"bilevel format: a {what} of {count} codes of {bits} bits does not end on a byte; make it a "
                    "multiple of 8"
                )

    @property
    def name(self) -> str:
        return f"uint{self.bits}_g{self.group}_bilevel{self.second}x{self.groups}"

    @property
    def block(self) -> int:
        return self.group * self.groups

    @property
    def tile(self) -> int:
        return 1

    @property
    def row_wise(self) -> bool:
        return True

    @property
    def about(self) -> str:
        per = f"a scale and a zero of {self.second} bits per {self.group}, ranges of these per {self.groups} groups"
        return f"SpQR: {self.bits}-bit integers, {per}"

    @property
    def bits_per_weight(self) -> float:
        return self.bits + 2 * self.second / self.group + 64 / self.block

    # scales: {"scale", "zero"} codes u8[*b, G], {"scale_low", "scale_step", "zero_low", "zero_step"} f32[*b, G / S]

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        x = self._groups(w)
        low, high = jnp.minimum(x.min(axis=-1), 0.0), jnp.maximum(x.max(axis=-1), 0.0)
        scales = self._fitted("scale", quotient(high - low, 2**self.bits - 1))
        return scales | self._fitted("zero", self._zeros(scales, low))

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b n"]:
        s, z = self._values("scale", scales)[..., None], self._values("zero", scales)[..., None]
        u = jnp.where(s > 0, quotient(self._groups(w), jnp.where(s > 0, s, 1.0)), 0.0)
        return self.level(u + z).reshape(w.shape).astype(jnp.uint8)

    def decode(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        s, z = self._values("scale", scales)[..., None], self._values("zero", scales)[..., None]
        return (s * (self._groups(codes).astype(jnp.float32) - z)).reshape(codes.shape)

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b n"]]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        s = self._values("scale", scales)
        return s, -s * self._values("zero", scales)

    def level(self, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
        return jnp.clip(jnp.round(u), 0, 2**self.bits - 1)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        if m is None:
            m = -self._values("scale", scales) * self._values("zero", scales)
        made = {**scales, "scale": self._coded("scale", scales, jnp.maximum(s, 0.0))}
        return {**made, "zero": self._coded("zero", made, self._zeros(made, m))}

    # storage

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        second = [scales[k] for k in ("scale_low", "scale_step", "zero_low", "zero_step")]
        return {
            "codes": pack_bits(self._groups(codes), self.bits),
            "scale": pack_bits(self._sets(scales["scale"]), self.second),
            "zero": pack_bits(self._sets(scales["zero"]), self.second),
            "second": jnp.stack(second, axis=-1).astype(jnp.float16),
        }

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        codes = unpack_bits(leaves["codes"], self.bits)
        second = leaves["second"].astype(jnp.float32)
        scales = {k: second[..., i] for i, k in enumerate(("scale_low", "scale_step", "zero_low", "zero_step"))}
        for k in ("scale", "zero"):
            scales[k] = unpack_bits(leaves[k], self.second).reshape(codes.shape[:-1])
        return scales, codes.reshape(*codes.shape[:-2], -1)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, groups, size = leaves["codes"].shape
        return (*lead, groups * (size * 8 // self.bits))

    # pieces; `of` is "scale" or "zero"

    def _groups(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.group)

    def _sets(self, x: Array) -> Array:
        """[*b, G] -> [*b, G / S, S]."""
        return x.reshape(*x.shape[:-1], -1, self.groups)

    def _fitted(self, of: str, v: Array) -> Scales:
        """A second level from the least to the largest of its S values, and their codes."""
        sets = self._sets(v)
        low = stored(sets.min(axis=-1), "f16")
        step = stored(quotient(sets.max(axis=-1) - low, 2**self.second - 1), "f16")
        level = {f"{of}_low": low, f"{of}_step": jnp.maximum(step, 0.0)}
        return level | {of: self._coded(of, level, v)}

    def _coded(self, of: str, scales: Scales, v: Array) -> Array:
        low, step = scales[f"{of}_low"][..., None], scales[f"{of}_step"][..., None]
        u = quotient(self._sets(v) - low, jnp.where(step > 0, step, 1.0))
        return jnp.clip(jnp.round(u), 0, 2**self.second - 1).reshape(v.shape).astype(jnp.uint8)

    def _values(self, of: str, scales: Scales) -> Array:
        """s or z of each group, f32[*b, G]; the product is exact, so a fused multiply-add gives the same."""
        sets = self._sets(scales[of].astype(jnp.float32))
        return (scales[f"{of}_low"][..., None] + scales[f"{of}_step"][..., None] * sets).reshape(scales[of].shape)

    def _zeros(self, scales: Scales, m: Array) -> Array:
        """z of m, the value of code 0."""
        s = self._values("scale", scales)
        z = jnp.where(s > 0, quotient(-m, jnp.where(s > 0, s, 1.0)), 0.0)
        return jnp.clip(z, 0.0, 2**self.bits - 1)


_NAME = re.compile(r"uint(\d+)_g(\d+)_bilevel(\d+)x(\d+)")


def parse(name: str) -> Bilevel | None:
    """The format of a name by the grammar above; None for other names.

    >>> parse("uint3_g16_bilevel3x16").bits_per_weight
    3.625
    """
    found = _NAME.fullmatch(name)
    return Bilevel(*map(int, found.groups())) if found else None


FORMATS = (Bilevel(),)
