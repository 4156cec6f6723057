"""How a ggml block lies in memory: fields one after another, each some bits of some of the block's numbers.

    Q5_K = Half("d"), Half("dmin"), SixBits("sc", "mn"), Planes("q", 256, 1, shift=4), Planes("q", 256, 4, 64)

A block's numbers are its codes "q" and its scales by name: u8[*b, blocks, count], or fp16 numbers f32[*b, blocks].
Fields of the same name hold different bits of the same numbers. Signed numbers are stored as number + bias, modulo 256.

A "plane" order puts number j of a group of B in byte j mod (B bits / 8): with 4 bits the low nibbles hold the first
half of the group and the high nibbles the second ("half-split"), with 2 bits a byte holds j, j + B/4, j + B/2 ...

    byte m  =  sum_k  number[m + k B bits/8] << (bits k)
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.protocol import Leaves
from qjax.formats.storage import fp16_bits
from qjax.typing import Array

Numbers = dict[str, Array]


@runtime_checkable
class Field(Protocol):
    """Some bytes of each block."""

    @property
    def size(self) -> int:
        """Bytes."""

    def write(self, numbers: Numbers) -> Array:
        """u8[*b, blocks, size]."""

    def read(self, raw: Array) -> Numbers:
        """What these bytes say of the numbers; the inverse of `write`."""


@dataclasses.dataclass(frozen=True)
class Half:
    """One fp16 number, little-endian."""

    of: str
    size: int = 2

    def write(self, numbers: Numbers) -> Array:
        return lax.bitcast_convert_type(fp16_bits(numbers[self.of]), jnp.uint8)

    def read(self, raw: Array) -> Numbers:
        return {self.of: lax.bitcast_convert_type(raw, jnp.float16).astype(jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Stream:
    """`bits` bits from `shift` up of `count` numbers, one number after another."""

    of: str
    count: int
    bits: int
    shift: int = 0

    @property
    def size(self) -> int:
        return self.count * self.bits // 8

    def write(self, numbers: Numbers) -> Array:
        return pack_bits(_some(numbers[self.of], self.shift, self.bits), self.bits)

    def read(self, raw: Array) -> Numbers:
        x = unpack_bits(raw, self.bits)
        return {self.of: (x if self.shift + self.bits <= 8 else x.astype(jnp.uint32)) << self.shift}


@dataclasses.dataclass(frozen=True)
class Planes:
    """`bits` (1, 2 or 4) bits from `shift` up of `count` numbers, in plane order over groups; 0: all are one group."""

    of: str
    count: int
    bits: int
    group: int = 0
    shift: int = 0

    @property
    def size(self) -> int:
        return self.count * self.bits // 8

    def write(self, numbers: Numbers) -> Array:
        x = _some(numbers[self.of], self.shift, self.bits)
        return merge(pack_planes(split(x, self.group or self.count), self.bits))

    def read(self, raw: Array) -> Numbers:
        groups = split(raw, (self.group or self.count) * self.bits // 8)
        return {self.of: merge(unpack_planes(groups, self.bits)) << self.shift}


@dataclasses.dataclass(frozen=True)
class Nibbles:
    """`count` bytes with one number in the low nibble and one in the high."""

    low: str
    high: str
    count: int

    @property
    def size(self) -> int:
        return self.count

    def write(self, numbers: Numbers) -> Array:
        return numbers[self.low] | (numbers[self.high] << 4)

    def read(self, raw: Array) -> Numbers:
        return {self.low: raw & 15, self.high: raw >> 4}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A type's layout: its one leaf is `blocks` u8[*b, n / block, bytes].

    Attributes:
      ggml_type: the type's number in a GGUF file.
      block: weights.
      fields: from the first byte on.
      bias: name and bias of numbers that are signed.
      tile: weights of one code.
    """

    ggml_type: int
    block: int
    fields: tuple[Field, ...]
    bias: tuple[tuple[str, int], ...] = ()
    tile: int = 1

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return sum(field.size for field in self.fields)

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / self.block

    def pack(self, scales: Numbers, codes: Array) -> Leaves:
        numbers = {**scales, "q": split(codes, self.block // self.tile)}
        for name, bias in self.bias:
            numbers[name] = numbers[name].astype(jnp.uint8) + jnp.uint8(bias)
        return {"blocks": jnp.concatenate([field.write(numbers) for field in self.fields], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Numbers, Array]:
        """Scales and codes."""
        if leaves["blocks"].shape[-1] != self.size:
            raise ValueError(f"a block has {self.size} bytes, got {leaves['blocks'].shape[-1]}")
        numbers: Numbers = {}
        at = 0
        for field in self.fields:
            for name, x in field.read(leaves["blocks"][..., at : at + field.size]).items():
                numbers[name] = _joined(numbers[name], x) if name in numbers else x
            at += field.size
        for name, bias in self.bias:
            numbers[name] = lax.bitcast_convert_type(numbers[name] - jnp.uint8(bias), jnp.int8)
        codes = merge(numbers.pop("q"))
        return numbers, codes

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, count, _ = leaves["blocks"].shape
        return (*lead, count * self.block)


def split(x: Array, block: int) -> Array:
    """[*b, n] -> [*b, n / block, block]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def merge(x: Array) -> Array:
    """[*b, n / block, block] -> [*b, n]; the inverse of `split`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def pack_planes(codes: Array, bits: int) -> Array:
    """Integers in [0, 2^bits), [*b, B] -> u8[*b, B bits / 8] in plane order; bits 1, 2 or 4.

    >>> pack_planes(jnp.array([1, 2, 3, 4]), 4).tolist()
    [49, 66]
    """
    per = 8 // bits
    planes = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], per, codes.shape[-1] // per)
    out = planes[..., 0, :]
    for k in range(1, per):
        out = out | (planes[..., k, :] << (bits * k))
    return out


def unpack_planes(packed: Array, bits: int) -> Array:
    """The inverse of `pack_planes`: u8[*b, m] -> u8[*b, m 8 / bits].

    >>> unpack_planes(jnp.array([49, 66], jnp.uint8), 4).tolist()
    [1, 2, 3, 4]
    """
    mask = 2**bits - 1
    return jnp.concatenate([(packed >> (bits * k)) & mask for k in range(8 // bits)], axis=-1)


def _joined(a: Array, b: Array) -> Array:
    """The bits of two fields, as the wider of their types."""
    dtype = max(a.dtype, b.dtype, key=lambda t: t.itemsize)
    return a.astype(dtype) | b.astype(dtype)


def _some(x: Any, shift: int, bits: int) -> Array:
    return (x >> shift) & (2**bits - 1)
