"""States of a trellis to float16 pairs: a window of L bits out of a row of the tile, and the row above it, hashed.

    window    prmt of two neighbouring words, shared by the 16 / K weights that end in the second; shift, and
    1mad,     u = a s + b;  the four bytes' sum, ten bits, is a float16 of 2^-24: mad, dp4a; for two, prmt. What is
    mul1      subtracted and divided goes onto the sums of the product
    3inst     u = a s + b;  (u & 0x8FFF8FFF) ^ 0x3B603B60 are two float16, whose sum is the weight: mad, lop3. The
              matrix unit adds them, x coming twice: exact, where a half-precision sum would round
    hyb       u = s (s + 1): mad; shift, and, mad, load of two levels as float16, lop3 for the sign of the first

    code        instructions a weight of 2 bits, beside loads of codes
    1mad, mul1  4.5
    3inst       4.0
    hyb         4.0

What a Hopper can issue while it reads a weight: 2.2 instructions for 2 bits, 4.4 for 4: all are bound by instructions.
A matrix unit could add the four bytes of u itself, as int8, were x int8; Mosaic's takes no unsigned bytes.

Source: QTIP, arXiv:2406.11235, section 3.1; formats/vectors/trellis_codes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats.vectors.grid import VectorCode
from qjax.formats.vectors.trellis import Trellis
from qjax.formats.vectors.trellis_codes import spiral
from qjax.kernels.layouts.points import UNIT
from qjax.kernels.mosaic_gpu.vectors.code import SUBNORMAL, Code
from qjax.kernels.mosaic_gpu.words import AND_OR, Words

_TURN = 0x78
"""a xor (b and c)."""
_AND_XOR = 0x6A
"""(a and b) xor c."""
_SIDES = tuple((i, UNIT + i) for i in range(UNIT))
_TWICE = tuple((i, i) for i in range(2 * UNIT))
_NEXT = tuple((i, i + 1) for i in range(0, 2 * UNIT, 2))


def code(of: VectorCode) -> Code:
    """How the kernel decodes a trellis.

    Args:
      of: a Trellis.

    Raises:
      UserError: another code.
    """
    if not isinstance(of, Trellis):
        raise UserError(f"no kernel decodes {type(of).__name__}")
    if of.code == "hyb":
        return Code(_NEXT, ((partial(pairs, of=of), 1.0),), table=_levels(), above=True)
    if of.code == "3inst":
        return Code(_TWICE, ((partial(halves, of=of), 1.0),), above=True)
    mul, add, unit = {"1mad": (34038481, 76625530, 147.8), "mul1": (0x83DCD12D, 0, 147.7)}[of.code]
    terms = ((partial(sums, of=of, mul=mul, add=add), 1.0),)
    return Code(_SIDES, terms, unit=SUBNORMAL / unit, center=-510.0 / unit, above=True)


def sums(ops: Words, words: Sequence[Any], run: int, of: Trellis, mul: int, add: int) -> Any:
    """Weight `run` of both units, in byte sums.

    Args:
      ops: what computes.
      words: K words of two units, and the last one of the row above.
      run: which pair.
      of: the trellis.
      mul, add: of the hash.

    Returns: the word of two float16.
    """
    hashed = (ops.mad(_state(ops, words, of, unit, run), ops.word(mul), ops.word(add)) for unit in (0, 1))
    low, high = (ops.bytes(u, ops.word(0)) for u in hashed)
    return ops.prmt(low, high, ops.word(0x5410))


def halves(ops: Words, words: Sequence[Any], run: int, of: Trellis) -> Any:
    """The two halves of a weight; as `sums`."""
    u = ops.mad(_state(ops, words, of, run // UNIT, run % UNIT), ops.word(89226354), ops.word(64248484))
    return ops.lop3(u, ops.word(0x8FFF8FFF), ops.word(0x3B603B60), _AND_XOR)


def pairs(ops: Words, words: Sequence[Any], run: int, of: Trellis) -> Any:
    """The two weights of a state; as `sums`."""
    s = _state(ops, words, of, run // 8, run % 8)
    u = ops.mad(s, s, s)
    entry = ops.look(ops.lop3(ops.shift(u, 6), ops.word(511), ops.word(0), AND_OR))
    return ops.lop3(entry, u, ops.word(0x8000), _TURN)


def _state(ops: Words, words: Sequence[Any], of: Trellis, unit: int, symbol: int) -> Any:
    """The L bits of a unit's stream that end with a symbol."""
    end = (symbol + 1) * of.step
    word = (end - 1) // 16
    two = ops.prmt(words[word], words[word - 1], ops.word(0x7632 if unit else 0x5410))  # words[-1]: the row above
    return ops.lop3(ops.shift(two, 16 * (word + 1) - end), ops.word(2**of.L - 1), ops.word(0), AND_OR)


@cache
def _levels() -> tuple[int, ...]:
    """hyb's table, each entry two float16."""
    return tuple(int(w) for w in spiral().astype(np.float16).view(np.uint32)[:, 0])
