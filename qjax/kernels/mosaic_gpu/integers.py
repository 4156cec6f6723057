"""Integer codes of 2 to 6 bits to bfloat16 pairs, from one plane of words or two.

0x4300 is the bfloat16 128, and the seven bits of its mantissa count by ones: 0x4300 | u << o is 128 + 2^o u. Exactly,

    T' = u + low  =  (0x4300 | u << o) 2^-o + (low - 128 2^-o)

    bits   planes   read     instructions for two weights, beside loads                    a weight
    2      2        2 bits   lop3, fma;  a shift for three runs                                 1.2
    3      2 + 1    3        lop3, shift, lop3, fma;  a shift for three runs                    2.2
    4      4        4        shift, lop3, fma                                                   1.4
    5, 6   4 + 1|2  5, 6     shift, lop3, shift, lop3, fma                                      2.4

What a Hopper can issue while it reads a weight: 2.2 instructions for 2 bits, 4.6 for 4.125, 5.0 for 4.5, 7.3 for 6.56.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.kernels.layouts.planes import SPLIT, WORD
from qjax.kernels.mosaic_gpu.words import AND_OR, Words, pair

ONE_TWENTY_EIGHT = 0x43004300
_MANTISSA = 7


def decode(ops: Words, planes: Sequence[Any], run: int, bits: int, low: int) -> Any:
    """Two weights of a run.

    Args:
      ops: what computes.
      planes: a word of each plane of the code, that of the run.
      run: which one of a block of words.
      bits: of the code.
      low: T' - u.

    Returns: the word of two bfloat16 T'.
    """
    (first, _), *others = SPLIT[bits]
    together = 1 + (_MANTISSA - bits) // first  # runs that one shift serves
    place = run % (WORD // first)
    at = first * (place % together)
    word = ops.shift(planes[0], first * (place - place % together))
    out = ops.lop3(word, ops.word(_twice(((1 << first) - 1) << at)), ops.word(ONE_TWENTY_EIGHT), AND_OR)
    for word, (more, shift) in zip(planes[1:], others, strict=True):
        moved = ops.shift(word, more * (run % (WORD // more)) - shift - at)
        out = ops.lop3(moved, ops.word(_twice(((1 << more) - 1) << (shift + at))), out, AND_OR)
    step = 2.0**-at
    return ops.fma(out, ops.word(pair(step)), ops.word(pair(low - 128 * step)))


def _twice(half: int) -> int:
    return half << 16 | half
