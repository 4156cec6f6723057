"""Codes into a table of sixteen levels to bfloat16 pairs: IQ4_NL, NF4, FP4, MXFP4.

A `prmt` looks four nibbles up in eight bytes. Levels are bfloat16, their low and high bytes looked up apart, below and
above level 8, and bit 3 of the code chooses:

    four codes of a 16-bit word  ->  4 low bytes, 4 high bytes  ->  4 levels, one of each run

All four runs of a word come out together: what they share is written anew for each and computed once, as the compiler
merges equal instructions.

    bits   read     instructions for eight weights, beside loads              a weight
    4      4 bits   12 prmt + 4 lop3 for levels' bytes, 6 for selectors,           3.4
                    2 prmt for masks, 8 prmt that sort bytes

What a Hopper can issue while it reads a weight: 4.7 instructions for 4.25 bits, 5.0 for 4.5. Levels are rounded to
bfloat16, as the weights of any product with bfloat16 inputs are (IQ4_NL's and FP4's integers stay what they are).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from qjax.kernels.mosaic_gpu.words import AND_OR, CHOOSE, Words


def decode(ops: Words, planes: Sequence[Any], run: int, table: tuple[float, ...]) -> Any:
    """Two weights of a run.

    Args:
      ops: what computes.
      planes: the word of the one plane.
      run: which one of a block of words.
      table: sixteen levels.

    Returns: the word of two bfloat16 levels.
    """
    low, high = _bytes(table)
    nibbles = _masked(ops, planes[0], 0x77777777)
    upper = _masked(ops, ops.shift(planes[0], 3), 0x11111111)
    place = run % 4
    halves = []
    for column in (0, 16):
        select, choose = ops.shift(nibbles, column), ops.shift(upper, column)
        mask = ops.prmt(ops.word(0x0000FF00), ops.word(0), choose)
        lows, highs = (_looked_up(ops, four, select, mask) for four in (low, high))
        halves.append(ops.prmt(lows, highs, ops.word(0x5140 if place < 2 else 0x7362)))
    return ops.prmt(halves[0], halves[1], ops.word(0x5410 if place % 2 == 0 else 0x7632))


def _looked_up(ops: Words, four: Sequence[int], select: Any, mask: Any) -> Any:
    """The bytes of four nibbles, from four words of them."""
    below = ops.prmt(ops.word(four[0]), ops.word(four[1]), select)
    above = ops.prmt(ops.word(four[2]), ops.word(four[3]), select)
    return ops.lop3(mask, above, below, CHOOSE)


def _masked(ops: Words, w: Any, mask: int) -> Any:
    return ops.lop3(w, ops.word(mask), ops.word(0), AND_OR)


def _bytes(table: tuple[float, ...]) -> tuple[list[int], list[int]]:
    """Low and high bytes of the levels as bfloat16, four words each."""
    halves = np.asarray(table, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return tuple((part.astype(np.uint8).view("<u4").tolist()) for part in (halves & 255, halves >> 8))  # type: ignore[return-value]
