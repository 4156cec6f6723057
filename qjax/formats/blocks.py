"""What ggml's block layouts have in common: blocks along a row, fp16 fields, nibbles and crumbs in planes.

A "plane" order puts code j of a group of B weights in byte j mod (B bits / 8): with 4 bits the low nibbles hold the
first half of the group and the high nibbles the second ("half-split"), with 2 bits a byte holds j, j + B/4, j + B/2 ...

    byte m  =  sum_k  code[m + k B bits/8] << (bits k)
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats.protocol import Leaves
from qjax.formats.storage import fp16_bits


def split(x: Array, block: int) -> Array:
    """[*b, n] -> [*b, n / block, block]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def merge(x: Array) -> Array:
    """[*b, n / block, block] -> [*b, n]; the inverse of `split`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def block_shape(leaves: Leaves, block: int) -> tuple[int, ...]:
    """The logical shape (*b, n) of a `blocks` leaf u8[*b, n / block, block_bytes]."""
    *lead, count, _ = leaves["blocks"].shape
    return (*lead, count * block)


def to_fp16_bytes(x: Array) -> Array:
    """f32[*b] -> u8[*b, 2], little-endian."""
    return lax.bitcast_convert_type(fp16_bits(x), jnp.uint8)


def from_fp16_bytes(raw: Array) -> Array:
    """u8[*b, 2] -> f32[*b]."""
    return lax.bitcast_convert_type(raw, jnp.float16).astype(jnp.float32)


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
