"""ggml's importance grids: tiles of 4 or 8 weights rounded to points of a table, IQ1_S to IQ3_S.

    w = d (2 sc + 1) / 8 T     IQ2_XXS, IQ2_XS, IQ2_S  sc of 4 bits for 32, 16, 16 weights;  256, 512, 1024 vectors of 8
    w = d (2 sc + 1) / 4 T     IQ3_XXS                 sc of 4 bits for 32;                  256 vectors of 4
    w = d (2 sc + 1) T         IQ3_S                   sc of 4 bits for 32;                  512 vectors of 4
    w = d (2 sc + 1) (T + m)   IQ1_S, IQ1_M            sc of 3 bits for 32, 16;              2048 vectors of 8 trits,
                               all moved by m = 1/8 or -1/8, which it is for 32 weights (IQ1_S) or for 8

    IQ2_XXS, 66 bytes:   d, per 32 weights 4 bytes of indices and a u32: four times 7 signs, sc
    IQ2_XS, 74 bytes:    d, qs u16[32] = index | signs << 9, scales[8] nibbles
    IQ2_S, 82 bytes:     d, qs[32] low 8 bits of the index, signs[32], qh[8] its top 2 bits, scales[8]
    IQ3_XXS, 98 bytes:   d, qs[64] indices, per 32 weights a u32 as in IQ2_XXS
    IQ3_S, 110 bytes:    d, qs[64] low 8 bits of the index, qh[8] its top bit, signs[32], scales[4]
    IQ1_S, 50 bytes:     d, qs[32] low 8 bits of the index, per 32 weights a u16: four times its top 3, sc, sign of m
    IQ1_M, 56 bytes:     qs[32], qh[16] nibbles: top 3 bits of index, sign of m; four u16 of four sc and a nibble of d

Where 7 signs are stored for 8 weights the eighth makes the number of negative ones even. Codes are one u32 a tile
(points.py). Source: ggml's block_iq1_s ... block_iq3_s. The search is our own (nearest.py, scales.py): every trial is
judged by the squared error itself, and with importance by the importance alone.
"""

from __future__ import annotations

from typing import Literal

from qjax.formats.fields import Blocks, Field, Half, Stream
from qjax.formats.iq.fields import FourTiles, HighBits, Scattered, Words
from qjax.formats.iq.grid import PointGrid
from qjax.formats.iq.points import Points
from qjax.formats.iq.scales import How, OddScales

_D = Half("d")
_HOW = How(shares=(1.0, 0.75))
_FAR = How(shares=(2.2, 1.6, 1.2))  # trits: the largest weight lies beyond them
_SHIFT = 0.125


def _format(
    name: str, number: int, sub: int, unit: int, signs: Literal["free", "even"], *fields: Field, parts: int = 1
) -> PointGrid:
    points = Points(name, parts, signs)
    layout = Blocks(number, 256, (_D, *fields), tile=points.tile)
    about = f"GGUF: {len(points.vectors)} points for {points.length} weights, {256 // sub} groups with 4-bit scales"
    return PointGrid(name, points, OddScales(_HOW, sub, 15, unit), layout, about)


def _ternary(name: str, number: int, scales: OddScales, shifts: tuple[float, ...], *fields: Field) -> PointGrid:
    points = Points("IQ1_S", 1, "none", shifts)
    about = f"GGUF: 2048 ternary points for 8 weights, {256 // scales.sub} groups with 3-bit scales"
    return PointGrid(name, points, scales, Blocks(number, 256, fields, tile=8), about)


FORMATS = (
    _format("IQ2_XXS", 16, 32, 8, "even", FourTiles(8, between=True)),
    _format("IQ2_XS", 17, 16, 8, "even", Words("q", 32, 2), Stream("sc", 16, 4)),
    _format(
        "IQ2_S", 22, 16, 8, "free",
        Stream("q", 32, 8), Stream("q", 32, 8, shift=10), Stream("q", 32, 2, shift=8), Stream("sc", 16, 4),
    ),
    _format("IQ3_XXS", 18, 32, 4, "even", FourTiles(16, between=False), parts=2),
    _format(
        "IQ3_S", 21, 32, 1, "free",
        Stream("q", 64, 8), Stream("q", 64, 1, shift=8), Stream("q", 64, 4, shift=9), Stream("sc", 8, 4),
    ),
    _ternary("IQ1_S", 19, OddScales(_FAR, 32, 7, 1, _SHIFT), (0.0,), _D, Stream("q", 32, 8), HighBits()),
    _ternary(
        "IQ1_M", 29, OddScales(_FAR, 16, 7, 1), (_SHIFT, -_SHIFT),
        Stream("q", 32, 8), Stream("q", 32, 4, shift=8), Scattered(),
    ),
)  # fmt: skip
