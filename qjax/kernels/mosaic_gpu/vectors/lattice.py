"""Points of E8P12 and of E8 to float16 pairs: a word of eight nibbles from a table, its signs from another.

    4 p = 2 b - 15,  b = 2 (q + 7/2) + [plus]        q = -5/2 ... 5/2 of E8P12, plus or minus 1/4
    2 r = b - 4                                      r = -2 ... 2 of the ball

Turning a sign is b xor 14, so that a point's word is magnitudes[byte] xor changes[byte], where `changes` knows the
parity that says plus or minus. Coordinates i and i + 4 are nibble i of the halves; nibble 1 is 16 times itself, for an
x of a sixteenth, and nibbles 2 and 3 come to 0 and 1 by a turn of the word by one byte.

    bits   read       instructions for eight weights, beside loads of codes                a weight
    2      2 bytes    2 prmt for bytes, 2 (mad, load), xor, prmt, 4 lop3                        1.5
    3      3          and prmt, mad, load, prmt, 4 lop3                                         2.5
    4      4          twice the first                                                           3.0

What a Hopper can issue while it reads a weight: 2.2 instructions for 2 bits, 3.3 for 3, 4.4 for 4. Random loads from a
kilobyte of shared memory meet in the same bank three times, on average.

Source: QuIP#, arXiv:2402.04396, section 4.2: a codebook of 1 KiB, and signs; formats/vectors/lattice.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats.vectors import lattice as points
from qjax.formats.vectors.grid import VectorCode
from qjax.kernels.mosaic_gpu.vectors.code import SUBNORMAL, Code
from qjax.kernels.mosaic_gpu.words import AND_OR, XOR, Words

_CHANGES, _BALL = 256, 512
_PLACES = tuple((16 * unit + 8 * point + i, 16 * unit + 8 * point + i + 4) for unit in (0, 1) for point in (0, 1)
                for i in range(4))  # fmt: skip
_SCALES = (1.0, 1 / 16) * 8


def code(of: VectorCode) -> Code:
    """How the kernel decodes a lattice's points.

    Args:
      of: E8P, or the sum of one and another or the ball.

    Raises:
      UserError: another code.
    """
    parts = (of.first, of.second) if isinstance(of, points.Residual) else (of,)
    if not isinstance(parts[0], points.E8P) or not all(isinstance(p, points.E8P | points.Ball) for p in parts):
        raise UserError(f"no kernel decodes {type(of).__name__} of {', '.join(type(p).__name__ for p in parts)}")
    factors = (1.0, of.fine) if isinstance(of, points.Residual) else (1.0,)
    first, center, terms = 0, 0.0, []
    for part, factor in zip(parts, factors, strict=True):
        decode, least = (ball, -2.0) if isinstance(part, points.Ball) else (e8p, -3.75)
        terms.append((partial(decode, bits=of.bits, first=first), factor))
        first, center = first + part.bits, center + factor * least
    return Code(_PLACES, tuple(terms), _SCALES, SUBNORMAL / 2, center, _table())


def e8p(ops: Words, words: Sequence[Any], run: int, bits: int, first: int) -> Any:
    """Two coordinates of a point of E8P12.

    Args:
      ops: what computes.
      words: those of two units.
      run: which pair.
      bits: bytes of eight weights.
      first: where in them the point's two are.

    Returns: the word of two float16.
    """
    byte = (run % 8 // 4) * bits + first
    which, changes = (_byte(ops, words, run // 8, byte + i) for i in (0, 1))
    nibbles = ops.lop3(ops.look(which), ops.look(changes, _CHANGES), ops.word(0), XOR)
    return _nibble(ops, nibbles, run % 4)


def ball(ops: Words, words: Sequence[Any], run: int, bits: int, first: int) -> Any:
    """Two coordinates of a point of the ball; as `e8p`."""
    which = _byte(ops, words, run // 8, (run % 8 // 4) * bits + first)
    return _nibble(ops, ops.look(which, _BALL), run % 4)


def _byte(ops: Words, words: Sequence[Any], unit: int, byte: int) -> Any:
    """A byte of a unit; the even ones are the high ones of their words."""
    return ops.prmt(words[byte // 2], ops.word(0), ops.word(0x4440 + 2 * unit + 1 - byte % 2))


def _nibble(ops: Words, nibbles: Any, i: int) -> Any:
    """Nibble i of both halves; 16 times it for the odd ones."""
    if i > 1:
        nibbles = ops.prmt(nibbles, nibbles, ops.word(0x0321))
    return ops.lop3(nibbles, ops.word(0x000F000F << 4 * (i % 2)), ops.word(0), AND_OR)


@cache
def _table() -> tuple[int, ...]:
    """Magnitudes, changes and the ball."""
    byte = np.arange(256)
    signs = byte[:, None] >> np.arange(8) & 1
    minus = signs.sum(axis=1) % 2
    signs[:, 0] ^= minus
    changes = 14 * signs + (1 - minus)[:, None]
    found = (2 * points.table() + 7, changes, 2 * points.ball() + 4)
    return tuple(int(w) for w in np.concatenate([_words(np.asarray(b, np.uint32)) for b in found]))


def _words(nibbles: np.ndarray) -> np.ndarray:
    """Eight nibbles as a word: u32[256, 8] -> u32[256]."""
    return (nibbles << np.arange(8, dtype=np.uint32) * 4).sum(axis=1, dtype=np.uint32)
