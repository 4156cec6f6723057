"""The fields of ggml's importance-grid blocks that are no plain streams of bits (fields.py has those).

FourTiles   for each four tiles: their indices, and a u32  signs | signs << 7 | signs << 14 | signs << 21 | sc << 28
Words       a code as a little-endian number of several bytes
HighBits    for each four tiles a u16: three high bits of each index, sc << 12, shift << 15
Scattered   four u16, each four sc of 3 bits and, at the top, four bits of the fp16 number d
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import lax

from qjax.formats.fields import Numbers
from qjax.formats.storage import fp16_bits
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Words:
    """`bytes_each` bytes of each of `count` numbers, from its lowest bit on."""

    of: str
    count: int
    bytes_each: int

    @property
    def size(self) -> int:
        return self.count * self.bytes_each

    def write(self, numbers: Numbers) -> Array:
        return _bytes(numbers[self.of], self.bytes_each)

    def read(self, raw: Array) -> Numbers:
        return {self.of: _words(raw, self.bytes_each)}


@dataclasses.dataclass(frozen=True)
class FourTiles:
    """32 codes "q" of `bits` bits of index (whole bytes) and seven signs, and 8 numbers "sc" of four bits.

    Attributes:
      between: each u32 stands behind its own tiles' indices, else all of them behind all.
    """

    bits: int
    between: bool

    @property
    def size(self) -> int:
        return 32 * self.bits // 8 + 32

    def write(self, numbers: Numbers) -> Array:
        q, sc = numbers["q"], numbers["sc"].astype(jnp.uint32)
        signs = _fours(q >> self.bits)
        word = signs[..., 0] | (signs[..., 1] << 7) | (signs[..., 2] << 14) | (signs[..., 3] << 21) | (sc << 28)
        index, words = _eights(_bytes(q, self.bits // 8)), _eights(_bytes(word, 4))
        if self.between:
            return _flat(jnp.concatenate([index, words], axis=-1))
        return jnp.concatenate([_flat(index), _flat(words)], axis=-1)

    def read(self, raw: Array) -> Numbers:
        size = 4 * self.bits // 8  # bytes of four indices
        if self.between:
            index, words = jnp.split(_eights(raw), [size], axis=-1)
        else:
            index, words = (_eights(a) for a in jnp.split(raw, [8 * size], axis=-1))
        word = _words(_flat(words), 4)
        signs = jnp.stack([(word >> (7 * k)) & 127 for k in range(4)], axis=-1)
        q = _words(_flat(index), self.bits // 8) | (_flat(signs) << self.bits)
        return {"q": q, "sc": (word >> 28).astype(jnp.uint8)}


@dataclasses.dataclass(frozen=True)
class HighBits:
    """Bits 8 to 10 of 32 codes "q", and 8 numbers "sc" of three bits and "shift" of one."""

    size: int = 16

    def write(self, numbers: Numbers) -> Array:
        high = _fours((numbers["q"] >> 8) & 7)
        sc, shift = (numbers[k].astype(jnp.uint32) for k in ("sc", "shift"))
        word = high[..., 0] | (high[..., 1] << 3) | (high[..., 2] << 6) | (high[..., 3] << 9)
        return _bytes(word | (sc << 12) | (shift << 15), 2)

    def read(self, raw: Array) -> Numbers:
        word = _words(raw, 2)
        high = jnp.stack([(word >> (3 * k)) & 7 for k in range(4)], axis=-1)
        sc, shift = ((word >> 12) & 7, word >> 15)
        return {"q": _flat(high) << 8, "sc": sc.astype(jnp.uint8), "shift": shift.astype(jnp.uint8)}


@dataclasses.dataclass(frozen=True)
class Scattered:
    """16 numbers "sc" of three bits and the fp16 number "d", its lowest four bits in the first word."""

    size: int = 8

    def write(self, numbers: Numbers) -> Array:
        sc = _fours(numbers["sc"].astype(jnp.uint32))
        d = fp16_bits(numbers["d"]).astype(jnp.uint32)
        nibbles = jnp.stack([(d >> (4 * k)) & 15 for k in range(4)], axis=-1)
        word = sc[..., 0] | (sc[..., 1] << 3) | (sc[..., 2] << 6) | (sc[..., 3] << 9) | (nibbles << 12)
        return _bytes(word, 2)

    def read(self, raw: Array) -> Numbers:
        word = _words(raw, 2)
        sc = jnp.stack([(word >> (3 * k)) & 7 for k in range(4)], axis=-1)
        d = sum(((word[..., k] >> 12) << (4 * k) for k in range(1, 4)), word[..., 0] >> 12)
        half = lax.bitcast_convert_type(d.astype(jnp.uint16), jnp.float16)
        return {"sc": _flat(sc).astype(jnp.uint8), "d": half.astype(jnp.float32)}


def _bytes(x: Array, count: int) -> Array:
    """The lowest bytes of each number, one number after another: u8[..., n count]."""
    return _flat(jnp.stack([(x >> (8 * k)).astype(jnp.uint8) for k in range(count)], axis=-1))


def _words(raw: Array, count: int) -> Array:
    """The inverse: u32[..., n]."""
    parts = raw.reshape(*raw.shape[:-1], -1, count).astype(jnp.uint32)
    return sum((parts[..., k] << (8 * k) for k in range(1, count)), parts[..., 0])


def _fours(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], -1, 4)


def _eights(x: Array) -> Array:
    return x.reshape(*x.shape[:-1], 8, -1)


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)
