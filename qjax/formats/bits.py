"""Sub-byte arrays: a little-endian bit stream along the last axis, in uint8.

Code j of a row occupies bits [j*bits, (j+1)*bits) of the row's stream, least significant bit first, so 4-bit codes lie
low nibble first and 3-bit codes straddle bytes. The same stream, read as int32 words, is what compressed-tensors and
GPTQ files store.
"""

from __future__ import annotations

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.typing import Array, Integer, UInt8


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of a row of n codes. Raises UserError where the row does not end on a byte."""
    if (n * bits) % 8:
        raise UserError(f"a row of {n} codes of {bits} bits does not end on a byte; make it a multiple of 8")
    return n * bits // 8


def pack_bits(codes: Integer[Array, "*b n"], bits: int) -> UInt8[Array, "*b m"]:
    """Pack integers in [0, 2^bits), bits <= 8.

    Args:
      codes: integers [*b, n], n * bits a multiple of 8.
      bits: 1 to 8.

    Returns: u8[*b, n * bits / 8].

    >>> pack_bits(jnp.array([1, 2, 3, 4]), 4).tolist()
    [33, 67]
    """
    *lead, n = codes.shape
    size = packed_bytes(n, bits)
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    if 8 % bits == 0:  # whole codes to a byte
        per = 8 // bits
        fields = codes.reshape(*lead, size, per).astype(jnp.uint32) << _shifts(per, bits, len(lead) + 1)
        return fields.sum(axis=-1, dtype=jnp.uint32).astype(jnp.uint8)
    stream = (codes[..., None] >> _shifts(bits, 1, len(lead) + 1).astype(jnp.uint8)) & 1
    stream = stream.reshape(*lead, size, 8).astype(jnp.uint32) << _shifts(8, 1, len(lead) + 1)
    return stream.sum(axis=-1, dtype=jnp.uint32).astype(jnp.uint8)


def unpack_bits(packed: UInt8[Array, "*b m"], bits: int) -> UInt8[Array, "*b n"]:
    """The inverse of `pack_bits`: u8[*b, m] -> u8[*b, m * 8 / bits].

    >>> unpack_bits(jnp.array([33, 67], jnp.uint8), 4).tolist()
    [1, 2, 3, 4]
    """
    *lead, size = packed.shape
    if bits == 8:
        return packed
    if 8 % bits == 0:
        per = 8 // bits
        fields = packed[..., None] >> _shifts(per, bits, len(lead) + 1).astype(jnp.uint8)
        return (fields & (2**bits - 1)).reshape(*lead, size * per)
    stream = (packed[..., None] >> _shifts(8, 1, len(lead) + 1).astype(jnp.uint8)) & 1
    stream = stream.reshape(*lead, size * 8 // bits, bits).astype(jnp.uint32) << _shifts(bits, 1, len(lead) + 1)
    return stream.sum(axis=-1, dtype=jnp.uint32).astype(jnp.uint8)


def _shifts(count: int, step: int, lead: int) -> Array:
    """0, step, 2 step ... on the last of lead + 1 axes."""
    return jnp.arange(0, count * step, step, dtype=jnp.uint32).reshape((1,) * lead + (count,))
