"""Codes of Q2_K and Q4_K times their integer scales, as float16 pairs: exact, as sc q has at most ten bits.

    w = d (sc q) - dmin mn          sc q up to 45 and 945; sums under d and dmin are those of 256 weights

Bits that a mask leaves in the ten lowest of a float16 are a number already, in units of 2^-24; times sc, which is
0x6400 | sc, the float16 1024 + sc, less 1024. Masks at places further left make powers of two more, for an x of as many
less. mn meets the sums of x under it: three float16, a product of 48 columns for each 256.

    bits   read         instructions for two weights, beside loads of codes and scales        a weight
    2      2.6 bits     lop3, fma;  a shift for three of eight;  lop3 and fma for sc                1.1
    4      4.6          lop3, fma;  a shift for every other                                         1.2

What a Hopper can issue while it reads a weight: 2.9 instructions for 2.6 bits, 5.1 for 4.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.kernels.mosaic_gpu.words import AND_OR, Words, pair16

MANTISSA = 10
_THOUSAND = 0x64006400


def place(run: int, bits: int) -> int:
    """Where in a word the codes of a run are masked."""
    field, together = run % (16 // bits), MANTISSA // bits
    return bits * (field % together)


def scaled(ops: Words, words: Sequence[Any], run: int, bits: int) -> Any:
    """sc q 2^place of the weights `run` of two units.

    Args:
      ops: what computes.
      words: of the units, and their scales'.
      run: which weight.
      bits: of a code.

    Returns: the word of two float16, in units of 2^-24.
    """
    *codes, scales = words
    at = bits * (run % (16 // bits))
    word = ops.shift(codes[run // (16 // bits)], at - place(run, bits))
    q = ops.lop3(word, ops.word(_twice(2**bits - 1) << place(run, bits)), ops.word(0), AND_OR)
    thousands = ops.lop3(scales, ops.word(_twice(15 if bits == 2 else 63)), ops.word(_THOUSAND), AND_OR)
    sc = ops.fma16(thousands, ops.word(pair16(1.0)), ops.word(pair16(-1024.0)))
    return ops.fma16(q, sc, ops.word(0))


def minima(ops: Words, words: Sequence[Any], run: int, bits: int) -> Any:
    """mn of two units, 16 times it for two bits; as `scaled`, whatever the run."""
    if bits == 2:
        return ops.lop3(words[-1], ops.word(_twice(15 << 4)), ops.word(0), AND_OR)
    return ops.lop3(ops.shift(words[-1], 8), ops.word(_twice(63)), ops.word(0), AND_OR)


def selects(bits: int) -> tuple[int, int]:
    """How `prmt` spreads a word of scales: a byte to each unit of a pair, or all 16 bits to both."""
    return (0x4140, 0x4342) if bits == 2 else (0x1010, 0x3232)


def _twice(half: int) -> int:
    return half << 16 | half
