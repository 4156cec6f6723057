"""Represent: every format by its name.

A family is a module with a tuple `FORMATS` of its members and, where members are made from parameters
(`int4_g128`), a function `parse(name) -> Format | None`. A format needs no registration to be used: every function
that takes a name takes the frozen record itself.
"""

from __future__ import annotations

import difflib
from types import ModuleType

from qjax.errors import UserError
from qjax.formats import (
    bilevel,
    codebook,
    float8,
    ggml_dense,
    ggml_fp4,
    ggml_simple,
    ggml_ternary,
    integer,
    iq4,
    kquant_affine,
    kquant_symmetric,
)
from qjax.formats.protocol import BlockFormat, Format

FAMILIES: tuple[ModuleType, ...] = (
    *(ggml_dense, ggml_simple, kquant_affine, kquant_symmetric, iq4, ggml_ternary, ggml_fp4),
    *(integer, bilevel, codebook, float8),
)

_BY_NAME: dict[str, Format] = {fmt.name: fmt for family in FAMILIES for fmt in family.FORMATS}


def format(spec: str | Format) -> Format:
    """The format of a name; a Format passes through.

    Raises:
      UserError: no such format; the message suggests the nearest names.

    >>> format("Q8_0").bits_per_weight
    8.5
    """
    if not isinstance(spec, str):
        if isinstance(spec, Format):
            return spec
        raise TypeError(f"expected a format name or a Format, got {spec!r}")
    if spec in _BY_NAME:
        return _BY_NAME[spec]
    for family in FAMILIES:
        parse = getattr(family, "parse", None)
        made = parse(spec) if parse is not None else None
        if made is not None:
            return made
    upper = {name.upper(): name for name in _BY_NAME}
    near = [upper[n] for n in difflib.get_close_matches(spec.upper(), upper, n=3)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"unknown format {spec!r}{hint} (`qjax formats` lists them all)")


def format_names() -> tuple[str, ...]:
    """The names of all formats with a fixed name."""
    return tuple(_BY_NAME)


__all__ = ["FAMILIES", "BlockFormat", "Format", "format", "format_names"]
