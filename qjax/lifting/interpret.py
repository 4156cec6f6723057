"""The interpreter: evaluates a jaxpr in which some variables hold weights. Equation by equation:

    no weight among the operands      evaluate the equation as it is
    jit, scan, cond, remat ...        interpret the body (`control`)
    dot_general with a weight         a use: `qjax.dot` if packed, the primitive itself if dense (`uses`)
    ragged dot, convolution           uses, which decode the weight as they multiply with it
    rows looked up in a weight        a use: only the rows are decoded
    transpose, reshape, slice ...     the result is a weight again (`layout`)
    concatenate, stack                the parts stay weights (`joined`)
    anything else                     a use of kind "other": the weight is decoded

A packed weight that must be decoded outside of these uses raises in strict mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.lifting import control, joined, lookup, ragged, uses
from qjax.lifting.jax_names import BODIES, JOINS, Literal, bind, consts, placed
from qjax.lifting.layout import rearrange
from qjax.lifting.scope import Scope, Stats
from qjax.lifting.weight import Dense, Weight


def interpret(args: Sequence[Any], scope: Scope) -> tuple[list[Any], Stats]:
    """Evaluate scope.jaxpr.

    Args:
      args: a value or Weight for each of its inputs.
      scope: where it stands in the program.

    Returns: its outputs, each a value or a Weight, and the visitor's statistics by source.

    Raises:
      UserError: a packed weight is used where it cannot stay packed, in strict mode.
    """
    jaxpr = scope.jaxpr
    last: dict[Any, int] = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts(jaxpr), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    stats: Stats = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        with placed(eqn):
            if any(joined.is_followed(v) for v in values):
                outs, new = _equation(eqn, i, values, scope)
                stats |= new
            else:
                outs = bind(eqn, values)
        env.update((v, out) for v, out in zip(eqn.outvars, outs, strict=True) if v in last)
        for v in eqn.invars:  # what no later equation reads is let go: outside jit, activations would pile up
            if not isinstance(v, Literal) and last[v] == i:
                env.pop(v, None)
    return [read(v) for v in jaxpr.outvars], stats


def _equation(eqn: Any, at: int, values: list[Any], scope: Scope) -> tuple[list[Any], Stats]:
    name = eqn.primitive.name
    if name in BODIES:
        return control.RULES[name](eqn, at, values, scope, interpret)
    if name in JOINS:
        whole = joined.join(eqn, values)
        return ([whole], {}) if whole is not None else (bind(eqn, uses.decoded(eqn, (at,), values, scope)), {})
    if name == "dot_general":
        return uses.dot(eqn, (at,), values, scope)
    if any(isinstance(v, joined.Joined) for v in values):
        one = joined.moved(eqn, values[0]) if len(values) == 1 else None
        return ([one], {}) if one is not None else (bind(eqn, uses.decoded(eqn, (at,), values, scope)), {})
    if name == "ragged_dot_general" and ragged.is_by_groups(eqn, values):
        return uses.ragged_dot(eqn, (at,), values, scope)
    if name == "conv_general_dilated" and isinstance(values[1], Weight) and not isinstance(values[0], Weight):
        return uses.conv(eqn, (at,), values, scope)
    if name in ("gather", "dynamic_slice") and isinstance(values[0], Weight):
        axis = lookup.feature_axis(eqn, values[0])
        if axis is not None:
            return uses.looked_up(eqn, (at,), values, scope, axis)
    try:
        moved = rearrange(eqn, values)
    except Dense as reason:
        return bind(eqn, uses.decoded(eqn, (at,), values, scope, str(reason))), {}
    return (moved, {}) if moved is not None else (bind(eqn, uses.decoded(eqn, (at,), values, scope)), {})
