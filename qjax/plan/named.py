"""A plan by one name: a llama-quantize mix, or one format for every matrix.

"Q4_K_M"     the mix                    "NF4", "int4_g128"     that format everywhere
"pure:Q4_0"  the format, where a mix has the same name
"""

from __future__ import annotations

from qjax.errors import UserError
from qjax.formats import Format, find, format_names, unknown
from qjax.models.config import DecoderConfig
from qjax.plan.mixes import ALIASES, FILE_TYPES, mix
from qjax.plan.rules import Plan, Rule


def is_mix(name: str) -> bool:
    """Whether llama-quantize knows the name as a file type."""
    return ALIASES.get(name.upper(), name.upper()) in FILE_TYPES


def plan_named(name: str, config: DecoderConfig | None, has_imatrix: bool = False) -> Plan:
    """The plan a name stands for.

    Args:
      name: a file type, a format's name, or `pure:` and a format's name.
      config: the decoder it is for; None: not known, so that only formats have a meaning.
      has_imatrix: whether the importance of inputs is known; some mixes choose by it.

    Raises:
      UserError: neither a file type nor a format, or a file type without a config.

    >>> print(plan_named("NF4", None))
    * -> NF4
    """
    if is_mix(name) and config is not None:
        return mix(name, config, has_imatrix=has_imatrix)
    made = find(name.removeprefix("pure:"))
    if made is not None:
        return Plan((Rule("*", made),), name)
    if is_mix(name):
        base = FILE_TYPES[ALIASES.get(name.upper(), name.upper())][1]
        raise UserError(
            f"{name} is a mix that chooses by the layers of a decoder, which a tree of weights does not tell: give a "
            f"format ({base}), a Plan, or the whole model (quantize_model, quantize_file)"
        )
    said = unknown("type", name, (*FILE_TYPES, *format_names()))
    known = "" if said.endswith("?") else f"; the file types are {' '.join(FILE_TYPES)}"
    raise UserError(f"{said}{known} (`qjax formats` lists the formats)")


def as_plan(plan: str | Format | Plan, config: DecoderConfig | None = None, has_imatrix: bool = False) -> Plan:
    """A Plan as it is, a format's record for every matrix, a name as `plan_named` reads it."""
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Format):
        return Plan((Rule("*", plan),), plan.name)
    if not isinstance(plan, str):
        raise UserError(f"a plan is a Plan, a Format, a format's name or a file type's (Q4_K_M), got {plan!r}")
    return plan_named(plan, config, has_imatrix)
