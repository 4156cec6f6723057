"""A plan by one name: a llama-quantize mix, or one format for every matrix.

"Q4_K_M"     the mix                    "NF4", "int4_g128"     that format everywhere
"pure:Q4_0"  the format, where a mix has the same name
"""

from __future__ import annotations

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.models.config import DecoderConfig
from qjax.plan.mixes import ALIASES, FILE_TYPES, mix
from qjax.plan.rules import Plan, Rule


def is_mix(name: str) -> bool:
    """Whether llama-quantize knows the name as a file type."""
    return ALIASES.get(name.upper(), name.upper()) in FILE_TYPES


def plan_named(name: str, config: DecoderConfig) -> Plan:
    """The plan a name stands for.

    Args:
      name: a file type, a format's name, or `pure:` and a format's name.
      config: the decoder it is for.

    Raises:
      UserError: neither a file type nor a format.
    """
    if is_mix(name):
        return mix(name, config)
    pure = name.removeprefix("pure:")
    try:
        return Plan((Rule("*", get_format(pure)),), name)
    except UserError as error:
        raise UserError(f"{error}; the file types are {' '.join(FILE_TYPES)}") from None
