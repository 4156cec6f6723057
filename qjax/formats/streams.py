"""The layout of formats that are leaves of their own and no file's: codes as a bit stream, scales beside them.

    codes   u8[*b, G, g bits / 8]     sub-byte codes of each group, little-endian (bits.py), offset by the lowest
    others  floats as they are [*b, G], integers as bit streams

A stream of integers ends on a byte: padded at the row's end, or at the end of each set of groups.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import FLOATS
from qjax.typing import Array, Integer


@runtime_checkable
class Leaf(Protocol):
    """One leaf beside the codes."""

    @property
    def bits(self) -> float:
        """Bits a weight; 0 where the row or the tensor has one."""

    def write(self, scales: Scales) -> Leaves:
        """The leaf of the scales."""

    def read(self, leaves: Leaves, groups: int) -> Scales:
        """The scales of the leaf; `groups` of them in a row."""


@dataclasses.dataclass(frozen=True)
class Floats:
    """Numbers as floats, one for `per` weights (0: for the row), or `parts` of several side by side."""

    key: str
    kind: str
    per: int
    parts: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        one = 8 * jnp.dtype(FLOATS[self.kind]).itemsize * max(len(self.parts), 1)
        return one / self.per if self.per else 0.0

    def write(self, scales: Scales) -> Leaves:
        x = jnp.stack([scales[part] for part in self.parts], axis=-1) if self.parts else scales[self.key]
        return {self.key: x.astype(FLOATS[self.kind])}

    def read(self, leaves: Leaves, groups: int) -> Scales:
        x = leaves[self.key].astype(jnp.float32)
        return {part: x[..., i] for i, part in enumerate(self.parts)} if self.parts else {self.key: x}


@dataclasses.dataclass(frozen=True)
class Codes:
    """Integers of `bits_each` bits, one for `per` weights: one stream a row, or one for each `count` of them.

    `real`: they are f32 in the scales, else u8.
    """

    key: str
    bits_each: int
    per: int
    count: int = 0
    real: bool = False

    @property
    def bits(self) -> float:
        return self.bits_each / self.per if self.per else 0.0

    def write(self, scales: Scales) -> Leaves:
        x = scales[self.key].astype(jnp.uint8)
        if self.count:
            return {self.key: pack_bits(x.reshape(*x.shape[:-1], -1, self.count), self.bits_each)}
        size = math.ceil(x.shape[-1] * self.bits_each / 8)
        return {self.key: pack_bits(_padded(x, 8 // math.gcd(8, self.bits_each)), self.bits_each)[..., :size]}

    def read(self, leaves: Leaves, groups: int) -> Scales:
        stream = leaves[self.key]
        if not self.count:
            stream = _padded(stream, self.bits_each // math.gcd(8, self.bits_each))
        x = unpack_bits(stream, self.bits_each)
        x = x.reshape(*x.shape[:-2], -1) if self.count else x[..., :groups]
        return {self.key: x.astype(jnp.float32) if self.real else x}


@dataclasses.dataclass(frozen=True)
class Streams:
    """Codes of `bits_each` bits from `low` up, in groups (0: the row is one), and the leaves beside them."""

    bits_each: int
    group: int
    leaves: tuple[Leaf, ...]
    low: int = 0

    @property
    def bits(self) -> float:
        return self.bits_each + sum(leaf.bits for leaf in self.leaves)

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        grouped = codes.reshape(*codes.shape[:-1], -1, self.group or codes.shape[-1])
        packed = {"codes": pack_bits(grouped.astype(jnp.uint8) + jnp.uint8(-self.low), self.bits_each)}
        for leaf in self.leaves:
            packed |= leaf.write(scales)
        return packed

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        codes = unpack_bits(leaves["codes"], self.bits_each)
        if self.low:
            codes = lax.bitcast_convert_type(codes - jnp.uint8(-self.low), jnp.int8)
        scales: Scales = {}
        for leaf in self.leaves:
            scales |= leaf.read(leaves, codes.shape[-2])
        return scales, codes.reshape(*codes.shape[:-2], -1)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, groups, size = leaves["codes"].shape
        return (*lead, groups * (size * 8 // self.bits_each))


def _padded(x: Array, multiple: int) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)])
