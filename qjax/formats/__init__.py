"""Represent: every format by its name.

A family is a module with a tuple `FORMATS` of its members and, where members are made from parameters
(`int4_g128`), a function `parse(name) -> Format | None`. A format needs no registration to be used: every function
that takes a name takes the frozen record itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from qjax.errors import UserError
from qjax.formats.protocol import BlockFormat, Format

FAMILIES: tuple[ModuleType, ...] = tuple(
    import_module(f"qjax.formats.{name}")
    for name in (
        *("ggml_dense", "ggml_simple", "kquants", "iq4", "iq", "ggml_low", "ggml_fp4"),
        *("integer", "offset", "bilevel", "codebook", "lookup", "float8"),
        *("vectors.e8p", "vectors.trellis", "vectors.additive"),
    )
)

_BY_NAME: dict[str, Format] = {fmt.name: fmt for family in FAMILIES for fmt in family.FORMATS}


# What llama.cpp has besides, as types of tensors or of files.
NOT_HERE = ("Q8_1", "Q8_K", "MXFP4_MOE")


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
    made = find(spec)
    if made is None:
        raise UserError(f"{unknown('format', spec, _BY_NAME)} (`qjax formats` lists them all)")
    return made


def find(name: str) -> Format | None:
    """The format of a name, or None. Raises UserError where a family knows the name but not its parameters."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    made = (parse(name) for parse in (getattr(family, "parse", None) for family in FAMILIES) if parse is not None)
    return next((fmt for fmt in made if fmt is not None), None)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Says that there is no such name: that llama.cpp's type is not here yet, or which names are near."""
    if name.upper() in NOT_HERE:
        return f"{name.upper()} is a type of llama.cpp's that qjax does not have yet"
    upper = {k.upper(): k for k in known}
    near = [upper[n] for n in difflib.get_close_matches(name.upper(), upper, n=3)]
    return f"unknown {what} {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def format_names() -> tuple[str, ...]:
    """The names of all formats with a fixed name."""
    return tuple(_BY_NAME)


__all__ = ["FAMILIES", "NOT_HERE", "BlockFormat", "Format", "find", "format", "format_names", "unknown"]
