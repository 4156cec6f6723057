"""What multiplies with weights or looks rows up in them: shown to the visitor, and packed weights stay packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from qjax.lifting import lookup, ragged
from qjax.lifting.contract import contraction, packed_dot
from qjax.lifting.jax_names import bind, has_body
from qjax.lifting.joined import Joined, divided, is_followed
from qjax.lifting.picked import by_entry
from qjax.lifting.scope import Place, Scope, Stats, contracts_whole
from qjax.lifting.weight import Dense, Weight, whole_axes


def decoded(eqn: Any, at: Place, values: Sequence[Any], scope: Scope, reason: str = "") -> list[Any]:
    """Operands with every weight decoded."""
    hidden = has_body(eqn)
    reason = reason or ("has a body that is not looked into" if hidden else "needs its values")

    def plain(v: Any, k: int) -> Any:
        return scope.decode(v, (*at, k), eqn.primitive.name, reason, hidden, scope.users(eqn)) if is_followed(v) else v

    return [plain(v, k) for k, v in enumerate(values)]


def dot(eqn: Any, at: Place, values: list[Any], scope: Scope, piece: int | None = None) -> tuple[list[Any], Stats]:
    """A dot_general of an activation with a weight, or with several joined, or of two weights.

    Args:
      piece: which part of the program's activation this one is; None: all of it.
    """
    if all(is_followed(v) for v in values):  # the packed one, else the second, stays a weight
        spare = 1 if isinstance(values[1], Joined) or (_is_packed(values[0]) and not _is_packed(values[1])) else 0
        reason = "multiplies it with another weight"
        values[spare] = scope.decode(values[spare], (*at, spare), "dot_general", reason)
    if any(isinstance(v, Joined) for v in values):
        return _by_parts(eqn, at, values, scope)
    first = isinstance(values[0], Weight)
    weight, x = (values[0], values[1]) if first else (values[1], values[0])
    c = contraction(eqn, x.ndim, weight, first)
    axes = contracts_whole(weight, c)

    def use() -> Any:
        key = (scope.name(eqn.invars[1 if first else 0]), c.x_batch, c.x_contract, piece)
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
        return bind(eqn, decoded(eqn, at, values, scope, str(reason))), {}
    if scope.program.visit is None:
        return [y], {}
    if axes is None:
        scope.other(weight, at, eqn.primitive.name)
        return [y], {}
    if not weight.picks:
        return scope.visit(use(), at, c.operand(x), y, c)
    seen, entries = by_entry(weight, c, x, axes)
    return scope.visit(use(), at, seen, y, c, entries)


def _is_packed(value: Any) -> bool:
    return isinstance(value, Weight) and value.packed


def _by_parts(eqn: Any, at: Place, values: list[Any], scope: Scope) -> tuple[list[Any], Stats]:
    """A dot_general with joined weights: one for each of them."""
    first = isinstance(values[0], Joined)
    whole, x = values if first else reversed(values)
    pieces = divided(eqn, whole, x, first)
    if pieces is None:
        reason = f"contracts the axis along which {len(whole.parts)} weights are joined: multiply with each and add"
        return bind(eqn, decoded(eqn, at, values, scope, reason)), {}
    ys: list[Any] = []
    stats: Stats = {}
    for k, (part, own) in enumerate(zip(whole.parts, pieces[0], strict=True)):
        pair = [part, own] if first else [own, part]
        piece = None if own is x else k
        (y,), new = dot(eqn, (*at, k), pair, scope, piece) if isinstance(part, Weight) else (bind(eqn, pair), {})
        ys.append(y)
        stats |= new
    return [jnp.concatenate(ys, pieces[1])], stats


def ragged_dot(eqn: Any, at: Place, values: list[Any], scope: Scope) -> tuple[list[Any], Stats]:
    """A ragged dot with a stack of weights, which is decoded as it is multiplied, like a matrix in `qjax.dot`."""
    x, weight, *sizes = values
    each, c = ragged.as_picked(eqn, values)
    axes = whole_axes(each, c.w_contract)

    def use() -> Any:
        assert axes is not None
        return scope.use(each, at, "dot", axes, scope.name(eqn.invars[0]), eqn.primitive.name, c.w_batch)

    if scope.program.replace_input is not None and axes is not None:
        x = c.arranged(scope.program.replace_input(use(), c.operand(x)), x.shape)
    y = bind(eqn, [x, weight.array(axes[-1] if axes else 0), *sizes])[0]
    if scope.program.visit is None:
        return [y], {}
    if axes is None:
        scope.other(weight, at, eqn.primitive.name)
        return [y], {}
    seen, entries = by_entry(each, c, x, axes)
    return scope.visit(use(), at, seen, y, c, entries)


def conv(eqn: Any, at: Place, values: list[Any], scope: Scope) -> tuple[list[Any], Stats]:
    """A convolution, whose kernel is decoded as it is multiplied. It is in the ledger and has no statistics."""
    x, weight = values
    if scope.program.visit is not None:
        scope.other(weight, at, eqn.primitive.name, kind="conv")
    return bind(eqn, [x, weight.array()]), {}


def looked_up(eqn: Any, at: Place, values: list[Any], scope: Scope, axis: int) -> tuple[list[Any], Stats]:
    """Rows looked up in a weight: they alone are decoded."""
    weight = values[0]
    stored = tuple(sorted({label[0] for label in weight.axes[axis]}))
    try:
        y = lookup.rows(eqn, values, weight.value if weight.packed else weight.array(stored[-1]))
    except Dense as reason:
        return bind(eqn, decoded(eqn, at, values, scope, str(reason))), {}
    if scope.program.visit is None:
        return [y], {}
    key = (tuple(scope.name(v) for v in eqn.invars[1:]), axis)
    use = scope.use(weight, at, "gather", stored, key, eqn.primitive.name)
    return scope.visit(use, at, lookup.row_indices(eqn, values, axis), y, None)
