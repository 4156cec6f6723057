"""The interpreter: evaluates a jaxpr in which some variables hold weights. Equation by equation:

    no weight among the operands      evaluate the equation as it is
    jit, scan, cond, remat ...        interpret the body (`control`)
    dot_general with a weight         a use: `qjax.dot` if packed, the primitive itself if dense
    rows looked up in a weight        a use: only the rows are decoded
    transpose, reshape, slice ...     the result is a weight again (`layout`)
    anything else                     a use of kind "other": the weight is decoded

A packed weight that must be decoded outside of the two uses raises in strict mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qjax.lifting import control, lookup
from qjax.lifting.contract import contraction, packed_dot
from qjax.lifting.jax_names import BODIES, Literal, bind, consts, has_body, placed
from qjax.lifting.layout import rearrange
from qjax.lifting.picked import by_entry
from qjax.lifting.scope import Scope, Stats, contracts_whole
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
            if any(isinstance(v, Weight) for v in values):
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
    if name == "dot_general":
        return _dot(eqn, at, values, scope)
    if name in ("gather", "dynamic_slice") and isinstance(values[0], Weight):
        axis = lookup.feature_axis(eqn, values[0])
        if axis is not None:
            return _lookup(eqn, at, values, scope, axis)
    try:
        moved = rearrange(eqn, values)
    except Dense as reason:
        return bind(eqn, _decoded(eqn, at, values, scope, str(reason))), {}
    return (moved, {}) if moved is not None else (bind(eqn, _decoded(eqn, at, values, scope)), {})


def _decoded(eqn: Any, at: int, values: Sequence[Any], scope: Scope, reason: str = "") -> list[Any]:
    """Operands with every weight decoded."""
    hidden = has_body(eqn)
    reason = reason or ("has a body that is not looked into" if hidden else "needs its values")
    return [
        scope.decode(v, (at, k), eqn.primitive.name, reason, hidden, scope.users(eqn)) if isinstance(v, Weight) else v
        for k, v in enumerate(values)
    ]


def _dot(eqn: Any, at: int, values: list[Any], scope: Scope) -> tuple[list[Any], Stats]:
    if all(isinstance(v, Weight) for v in values):  # two weights: the packed one, else the second, stays a weight
        spare = 1 if values[0].packed and not values[1].packed else 0
        values[spare] = scope.decode(values[spare], (at, spare), "dot_general", "multiplies it with another weight")
    first = isinstance(values[0], Weight)
    weight, x = (values[0], values[1]) if first else (values[1], values[0])
    c = contraction(eqn, x.ndim, weight, first)
    axes = contracts_whole(weight, c)

    def use() -> Any:
        key = (scope.name(eqn.invars[1 if first else 0]), c.x_batch, c.x_contract)
        assert axes is not None
        return scope.use(weight, at, "dot", axes, key, eqn.primitive.name, c.w_batch)

    if scope.program.replace_input is not None and axes is not None:
        x = c.arranged(scope.program.replace_input(use(), c.operand(x)), x.shape)
        values = [values[0], x] if first else [x, values[1]]
    try:
        if weight.packed:
            y = packed_dot(eqn, c, x, weight.value)
        else:
            array = weight.array(axes[-1] if axes else 0)
            y = bind(eqn, [array, x] if first else [x, array])[0]
    except Dense as reason:
        return bind(eqn, _decoded(eqn, at, values, scope, str(reason))), {}
    if scope.program.visit is None:
        return [y], {}
    if axes is None:
        scope.other(weight, (at,), eqn.primitive.name)
        return [y], {}
    if not weight.picks:
        return scope.visit(use(), at, c.operand(x), y, c)
    seen, entries = by_entry(weight, c, x, axes)
    return scope.visit(use(), at, seen, y, c, entries)


def _lookup(eqn: Any, at: int, values: list[Any], scope: Scope, axis: int) -> tuple[list[Any], Stats]:
    weight = values[0]
    stored = tuple(sorted({label[0] for label in weight.axes[axis]}))
    try:
        y = lookup.rows(eqn, values, weight.value if weight.packed else weight.array(stored[-1]))
    except Dense as reason:
        return bind(eqn, _decoded(eqn, at, values, scope, str(reason))), {}
    if scope.program.visit is None:
        return [y], {}
    key = (tuple(scope.name(v) for v in eqn.invars[1:]), axis)
    use = scope.use(weight, at, "gather", stored, key, eqn.primitive.name)
    return scope.visit(use, at, lookup.row_indices(eqn, values, axis), y, None)
