"""Integers of 2 to 8 bits under group scales: w_hat = s (q - z).

    symmetric   q in [-2^(b-1), 2^(b-1) - 1],  z = 0, or z = -1/2 for half-integer ("mid-rise") levels
    affine      q in [0, 2^b - 1],             z an integer code of b bits, or a float

`affine(...)` makes one from parameters, `parse` from its name:

    int<bits>|uint<bits> _ g<group>|row [_mid] [_half|_mse] [_bf16|_f32|_u<k>x<S>|_u<k>xrow] [_zf16|_zbf16]

    int     symmetric;  uint  affine, with integer zeros
    g, row  weights that share a scale: consecutive along the contracted axis, or all of a row
    mid     half-integer levels
    half    s = absmax / (2^(b-1) - 1/2): the extremes may lie half a step outside the grid (GPTQ, compressed-tensors)
    mse     s, and z, of least (weighted) squared error
    bf16 .. type of the scales; default f16. u<k>x<S>: k-bit unsigned codes under one f16 per S groups, or per row
    zf16 .. type of float zeros

`int4_g128`, `uint3_g64`, `int2_g64_mid_mse`, `uint4_row_bf16`, `int3_g16_u6x16`, `uint4_g64_mse_zf16`.
The leaves are drawn in `integer_grid`.
"""

from __future__ import annotations

import re

from qjax.formats.integer_grid import IntegerFormat


def affine(
    bits: int,
    group: int = 128,
    *,
    symmetric: bool = False,
    scale: str = "f16",
    zero: str = "int",
    levels: str = "mid-tread",
    search: str = "absmax",
) -> IntegerFormat:
    """A format of integers under group scales, w_hat = s (q - z).

    Args:
      bits: 2 to 8.
      group: weights that share a scale; 0: all of a row.
      symmetric: z = 0 and signed codes.
      scale: "f16", "bf16", "f32", or "u<k>x<S>" ("u6x16", "u4xrow"): codes of k bits under an f16 per S groups.
      zero: "int", "f16" or "bf16"; affine formats only.
      levels: "mid-tread" has a level at zero, "mid-rise" (symmetric only) lies half a step around it.
      search: "absmax": the least scale that clips nothing (for affine: min-max; with integer zeros the range
        includes 0); "half": see the module's docstring; "mse": least squared error, weighted if a weight is given.
        The first two do not look at the weight.

    Raises:
      UserError: a parameter out of range, or two that exclude each other.

    >>> affine(4, symmetric=True).name, affine(2, 64, symmetric=True, levels="mid-rise", search="mse").name
    ('int4_g128', 'int2_g64_mid_mse')
    >>> affine(4, 128).bits_per_weight
    4.15625
    """
    return IntegerFormat(bits, group, symmetric, scale, "none" if symmetric and zero == "int" else zero, levels, search)


_NAME = re.compile(
    r"(u?)int(\d+)_(?:g([1-9]\d*)|row)(_mid)?(?:_(half|mse))?(?:_(bf16|f32|u\d+x(?:\d+|row)))?(?:_z(f16|bf16))?"
)


def parse(name: str) -> IntegerFormat | None:
    """The format of a name by the grammar above; None for other names.

    >>> parse("uint4_g32_mse") == affine(4, 32, search="mse"), parse("Q4_0")
    (True, None)
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    unsigned, bits, group, mid, search, scale, zero = found.groups()
    return affine(
        int(bits),
        int(group or 0),
        symmetric=not unsigned,
        scale=scale or "f16",
        zero=zero or "int",
        levels="mid-rise" if mid else "mid-tread",
        search=search or "absmax",
    )


FORMATS = (
    affine(8, 0, symmetric=True),
    *(affine(b, 128, symmetric=True) for b in (8, 4, 3)),
    affine(4, 32, symmetric=True),
    *(affine(b, 128, symmetric=True, search="mse") for b in (4, 3)),
    *(affine(b, 64, symmetric=True, levels="mid-rise", search="mse") for b in (3, 2)),
    *(affine(b, 128) for b in (4, 3)),
    affine(4, 32),
    affine(2, 64),
    *(affine(b, 64, search="mse") for b in (3, 2)),
    affine(4, 64, zero="f16"),
    affine(3, 16, symmetric=True, scale="u6x16", search="mse"),
    affine(2, 16, scale="u4x16", search="mse"),
)
