"""Codes of a few bits as planes of 16-bit words: one mask and one shift give a run of neighbouring weights.

    word j of a block of (16 / bits) P codes  =  sum_i code[i P + j] << (bits i)        i < 16 / bits, j < P

                 bits 15-12   11-8   7-4   3-0           bits 4, P = 32: a block of 128 codes is 32 words
    word 0           96        64     32    0
    word 1           97        65     33    1            run i: codes 32 i ... 32 i + 31, bits 4 i ... of words
    ...
    word 31         127        95     63   31

Two words lie in a 32-bit register; `(w >> 4 i) & 0x000F000F` are two neighbouring codes where a bfloat16 pair has the
low bits of its mantissas. Codes of 3, 5 and 6 bits are two planes, 2 + 1, 4 + 1 and 4 + 2.
"""

from __future__ import annotations

import jax.numpy as jnp

from qjax.typing import Array, Shaped, UInt8

WORD = 16

SPLIT: dict[int, tuple[tuple[int, int], ...]] = {
    2: ((2, 0),),
    3: ((2, 0), (1, 2)),
    4: ((4, 0),),
    5: ((4, 0), (1, 4)),
    6: ((4, 0), (2, 4)),
    8: ((8, 0),),
}
"""The planes of a code of so many bits: (bits, shift) each, the lowest first."""


def pack_plane(codes: UInt8[Array, "*b n"], bits: int, run: int) -> Shaped[Array, "*b words"]:
    """One plane.

    Args:
      codes: of `bits` bits, 1, 2, 4 or 8; n a multiple of 16 / bits times `run`.
      run: P of the module's docstring.

    Returns: u16[*b, n bits / 16].

    >>> [hex(w) for w in pack_plane(jnp.arange(8, dtype=jnp.uint8), 4, 2).tolist()]
    ['0x6420', '0x7531']
    """
    per = WORD // bits
    runs = codes.astype(jnp.uint16).reshape(*codes.shape[:-1], -1, per, run)
    words = runs[..., 0, :]
    for i in range(1, per):
        words = words | (runs[..., i, :] << (bits * i))
    return words.reshape(*codes.shape[:-1], -1)


def unpack_plane(words: Shaped[Array, "*b words"], bits: int, run: int) -> UInt8[Array, "*b n"]:
    """The inverse of `pack_plane`.

    >>> unpack_plane(pack_plane(jnp.arange(8, dtype=jnp.uint8), 4, 2), 4, 2).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    blocks = words.reshape(*words.shape[:-1], -1, 1, run)
    shifts = jnp.arange(0, WORD, bits, dtype=jnp.uint16).reshape((1,) * (words.ndim) + (-1, 1))
    codes = (blocks >> shifts) & jnp.uint16(2**bits - 1)
    return codes.astype(jnp.uint8).reshape(*words.shape[:-1], -1)
