"""Signed bytes to bfloat16 pairs.

A byte in two's complement is its low seven bits less 128 where bit 7 is set, and bit 7 is the lowest of a bfloat16's
exponent: 0x4300 | 0x80 is 256. So

    T' = (0x4300 | u & 0x7F) - (0x4300 | u & 0x80)

    bits   read     instructions for two weights, beside loads      a weight
    8      8 bits   lop3, lop3, fma;  a shift for every other run        1.8

What a Hopper can issue while it reads a weight: 9.1 instructions for 8.125 bits, 9.4 for 8.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.kernels.mosaic_gpu.integers import ONE_TWENTY_EIGHT
from qjax.kernels.mosaic_gpu.words import AND_OR, Words, pair


def decode(ops: Words, planes: Sequence[Any], run: int) -> Any:
    """Two weights of a run.

    Args:
      ops: what computes.
      planes: the word of the one plane.
      run: which one of a block of words.

    Returns: the word of two bfloat16 T', -128 ... 127.
    """
    word = ops.shift(planes[0], 8 * (run % 2))
    bias = ops.word(ONE_TWENTY_EIGHT)
    low = ops.lop3(word, ops.word(0x007F007F), bias, AND_OR)
    high = ops.lop3(word, ops.word(0x00800080), bias, AND_OR)
    return ops.fma(high, ops.word(pair(-1.0)), low)
