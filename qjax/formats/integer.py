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
How scales are found: integer_scales.py.

Leaves, for weights [*b, n] in G = n / g groups (G = 1 for rows); sub-byte codes are the little-endian bit stream of
`bits.pack_bits`, symmetric ones offset by 2^(b-1):

    codes   u8[*b, G, g b / 8]
    scale   f16 | bf16 | f32 [*b, G],  or the k-bit stream u8[*b, ceil(G k / 8)] with
    super   f16[*b, G / S]
    zero    the b-bit stream u8[*b, ceil(G b / 8)],  or f16 | bf16 [*b, G]

A stream of scales or zeros is padded to a whole byte at the row's end; `bits_per_weight` leaves that padding out.
"""

from __future__ import annotations

import re
from typing import Literal

from qjax.errors import UserError
from qjax.formats.grid import Grid
from qjax.formats.integer_scales import IntegerScales, Nested
from qjax.formats.levels import Integers
from qjax.formats.storage import FLOATS
from qjax.formats.streams import Codes, Floats, Leaf, Streams


def affine(
    bits: int,
    group: int = 128,
    *,
    symmetric: bool = False,
    scale: str | Nested = "f16",
    zero: str = "int",
    levels: str = "mid-tread",
    search: str = "absmax",
) -> Grid:
    """A format of integers under group scales, w_hat = s (q - z).

    Args:
      bits: 2 to 8.
      group: weights that share a scale; 0: all of a row.
      symmetric: z = 0 and signed codes.
      scale: "f16", "bf16", "f32", or `Nested(k, S)`: codes of k bits under an f16 per S groups, or per row (0).
      zero: "int", "f16" or "bf16"; affine formats only.
      levels: "mid-tread" has a level at zero, "mid-rise" (symmetric only) lies half a step around it.
      search: "absmax": the least scale that clips nothing (for affine: min-max; with integer zeros the range
        includes 0); "half": see the module's docstring; "mse": least squared error, weighted if a weight is given.
        The first two do not look at the weight.

    Raises:
      UserError: a parameter out of range, or two that exclude each other.

    >>> affine(4, symmetric=True).name, affine(2, 64, symmetric=True, levels="mid-rise", search="mse").name
    ('int4_g128', 'int2_g64_mid_mse')
    >>> affine(4, 128).bits_per_weight, affine(3, 16, symmetric=True, scale=Nested(6, 16)).name
    (4.15625, 'int3_g16_u6x16')
    """
    _check(bits, group, symmetric, scale, zero, levels, search)
    low, mid = (-(2 ** (bits - 1)) if symmetric else 0), levels == "mid-rise"
    kind: Literal["none", "int", "f16", "bf16"] = "none" if symmetric else zero  # type: ignore[assignment]
    scaling = IntegerScales(group, scale, kind, search, 2**bits - 1)  # type: ignore[arg-type]
    name = _name(bits, group, symmetric, scale, kind, mid, search)
    layout = Streams(bits, group, _beside(bits, group, scale, kind), low)
    about = _about(bits, group, scale, kind, mid, search)
    return Grid(name, Integers(low, low + 2**bits - 1, mid), scaling, layout, about)


def _beside(bits: int, group: int, scale: str | Nested, zero: str) -> tuple[Leaf, ...]:
    """The leaves of scales and zeros."""
    if isinstance(scale, Nested):
        leaves: list[Leaf] = [Codes("scale", scale.bits, group), Floats("super", "f16", group * scale.groups)]
    else:
        leaves = [Floats("scale", scale, group)]
    if zero != "none":
        leaves.append(Codes("zero", bits, group, real=True) if zero == "int" else Floats("zero", zero, group))
    return tuple(leaves)


def _name(bits: int, group: int, symmetric: bool, scale: str | Nested, zero: str, mid: bool, search: str) -> str:
    parts = [f"{'' if symmetric else 'u'}int{bits}", f"g{group}" if group else "row"]
    parts += ["mid"] * mid + [search] * (search != "absmax")
    parts += [str(scale)] * (scale != "f16") + [f"z{zero}"] * (zero in FLOATS)
    return "_".join(parts)


def _about(bits: int, group: int, scale: str | Nested, zero: str, mid: bool, search: str) -> str:
    words = [
        f"{bits}-bit {'symmetric' if zero == 'none' else 'affine'} integers",
        f"{f'nested scales ({scale})' if isinstance(scale, Nested) else f'a {scale} scale'} per {group or 'row'}",
        f"{zero} zeros" if zero in FLOATS else "",
        "half-integer levels" if mid else "",
        "searched for least squared error" if search == "mse" else "",
    ]
    return ", ".join(filter(None, words))


def _check(bits: int, group: int, symmetric: bool, scale: str | Nested, zero: str, levels: str, search: str) -> None:
    def check(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"integer format: {message}")

    nested = isinstance(scale, Nested)
    check(bits in range(2, 9), f"bits must be 2 to 8, got {bits}")
    check(
        group >= 0 and group * bits % 8 == 0,
        f"a group of {group} codes of {bits} bits does not end on a byte; make it a multiple of 8",
    )
    good = scale.bits in range(2, 9) and scale.groups >= 0 if isinstance(scale, Nested) else scale in FLOATS
    check(good, f"scale must be f16, bf16, f32 or u<2-8>x<groups|row>, got {str(scale)!r}")
    check(not nested or group > 0, "a row has one scale: nothing to nest under a super-scale")
    zeros = ("int", "none") if symmetric else ("int", "f16", "bf16")
    kind = "a symmetric" if symmetric else "an affine"
    check(zero in zeros, f"{kind} format has zero {'none' if symmetric else ' or '.join(zeros)}, got {zero!r}")
    check(levels in ("mid-tread", "mid-rise"), f"levels must be mid-tread or mid-rise, got {levels!r}")
    check(symmetric or levels == "mid-tread", "mid-rise levels are symmetric")
    check(search in ("absmax", "half", "mse"), f"search must be absmax, half or mse, got {search!r}")
    check(
        search != "half" or (symmetric and levels == "mid-tread"),
        "search 'half' is for symmetric mid-tread levels; elsewhere it would be absmax",
    )


_NAME = re.compile(
    r"(u?)int(\d+)_(?:g([1-9]\d*)|row)(_mid)?(?:_(half|mse))?(?:_(bf16|f32|u(\d+)x(\d+|row)))?(?:_z(f16|bf16))?"
)


def parse(name: str) -> Grid | None:
    """The format of a name by the grammar above; None for other names.

    >>> parse("uint4_g32_mse") == affine(4, 32, search="mse"), parse("Q4_0")
    (True, None)
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    unsigned, bits, group, mid, search, scale, inner, groups, zero = found.groups()
    nested = inner and Nested(int(inner), 0 if groups == "row" else int(groups))
    return affine(
        int(bits),
        int(group or 0),
        symmetric=not unsigned,
        scale=nested or scale or "f16",
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
    affine(3, 16, symmetric=True, scale=Nested(6, 16), search="mse"),
    affine(2, 16, scale=Nested(4, 16), search="mse"),
)
