"""Equations with a body: the body is interpreted, and weights go in packed.

Statistics leave a body with its results: as extra outputs of a jit or remat, stacked along the steps of a scan, zero
for the branches of a cond that are not taken. Out of a `while` or `shard_map` nothing can be brought.

A weight that a loop carries along unchanged is a constant of the loop; one that it changes must be decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.lifting import jax_names, packed
from qjax.lifting.jax_names import body
from qjax.lifting.joined import Joined, is_followed
from qjax.lifting.picked import forget, is_picked
from qjax.lifting.scope import Place, Scope, Stats
from qjax.lifting.weight import Dense, Weight

Interpret = Callable[[Sequence[Any], Scope], tuple[list[Any], Stats]]
Rule = Callable[[Any, int, list[Any], Scope, Interpret], tuple[list[Any], Stats]]


def _inline(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    """A call; or a function with a derivative of its own, which packed operands do not fit: its plain body runs."""
    return run(values, scope.call(eqn, body(eqn), at))


def _jit(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    inner = scope.call(eqn, body(eqn), at)

    def fn(*args: Any) -> tuple[list[Any], Stats]:
        return run(args, inner)

    fn.__name__ = eqn.params["name"]
    outs, stats = jax.jit(fn, inline=eqn.params["inline"])(*values)
    return jax_names.keep_shardings(eqn, outs), stats


def _remat(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    inner = scope.call(eqn, body(eqn), at)
    options = {k: eqn.params[k] for k in ("policy", "prevent_cse")}
    return jax.checkpoint(lambda *args: run(args, inner), **options)(*values)


def _scan(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    jaxpr, (n, m) = body(eqn), jax_names.scan_parts(eqn)
    inner = scope.enter(jaxpr, at, stacked=(*scope.stacked, eqn.params["length"]))
    consts, carry, xs = values[:n], values[n : n + m], values[n + m :]
    fixed = _unchanged(carry, jaxpr.invars[n:], jaxpr.outvars)
    carry = _plain(carry, eqn, (at, -1, n), scope, "changes it", keep=fixed)
    xs = [_steps(v, eqn, (at, -1, n + m + k), scope) for k, v in enumerate(xs)]
    stepped = scope.program.steps_over(inner.place, {v.path for v in xs if isinstance(v, Weight)})
    feed = {k: v for k, v in scope.feed.items() if k in stepped}

    def step(moving: Any, present: Any) -> Any:
        arrays, taken = present
        rows = (_one_step(v, array, len(scope.stacked)) for v, array in zip(xs, arrays, strict=True))
        args = [*consts, *_merge(carry, fixed, moving), *rows]
        outs, stats = run(args, dataclasses.replace(inner, feed=scope.feed | taken))
        outs = _plain(outs, eqn, (at, -2), scope, "returns it", keep=fixed)
        return _moving(outs[:m], fixed, eqn.outvars), (outs[m:], stats)

    init = _moving(carry, fixed, eqn.outvars)
    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    moved, (ys, stats) = jax.lax.scan(step, init, (_values(xs), feed), **options)
    return [*_merge(carry, fixed, moved), *ys], stats


def _while(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts, carry = values[:n], values[n : n + m], values[n + m :]
    test = scope.enter(eqn.params["cond_jaxpr"], at, 0, inside="while")
    inner = scope.enter(eqn.params["body_jaxpr"], at, 1, inside="while")
    fixed = _unchanged(carry, inner.jaxpr.invars[m:], inner.jaxpr.outvars)
    carry = _plain(carry, eqn, (at, -1, n + m), scope, "changes it", keep=fixed)

    def proceed(moving: Any) -> Any:
        return run([*cond_consts, *_merge(carry, fixed, moving)], test)[0][0]

    def step(moving: Any) -> Any:
        outs, _ = run([*body_consts, *_merge(carry, fixed, moving)], inner)
        return _moving(_plain(outs, eqn, (at, -2), scope, "returns it", keep=fixed), fixed, eqn.outvars)

    moved = jax.lax.while_loop(proceed, step, _moving(carry, fixed, eqn.outvars))
    return _merge(carry, fixed, moved), {}


def _cond(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    index, *operands = values

    def branch(k: int, jaxpr: Any) -> Callable[..., tuple[list[Any], Stats]]:
        inner = scope.enter(jaxpr, at, k)

        def fn(*args: Any) -> tuple[list[Any], Stats]:
            outs, stats = run(args, inner)
            return _moving(_plain(outs, eqn, (at, -2), scope, "returns it"), set(), eqn.outvars), stats

        return fn

    branches = [branch(k, jaxpr) for k, jaxpr in enumerate(body(eqn))]
    shapes: Stats = {}
    for fn in branches:  # each branch must return the statistics of all
        shapes |= jax.eval_shape(fn, *operands)[1]

    def padded(fn: Callable[..., tuple[list[Any], Stats]]) -> Callable[..., tuple[list[Any], Stats]]:
        def with_zeros(*args: Any) -> tuple[list[Any], Stats]:
            outs, stats = fn(*args)
            return outs, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes) | stats

        return with_zeros

    return jax.lax.switch(index, [padded(fn) for fn in branches], *operands)


def _shard_map(eqn: Any, at: int, values: list[Any], scope: Scope, run: Interpret) -> tuple[list[Any], Stats]:
    inner = scope.enter(body(eqn), at, inside="shard_map")
    values = [_plain([v], eqn, (at, -3, k), scope, "maps joined weights")[0] if isinstance(v, Joined) else v
              for k, v in enumerate(values)]  # fmt: skip
    operands, specs = list(values), list(eqn.params["in_specs"])
    for k, v in enumerate(values):
        if isinstance(v, Weight) and v.packed:
            try:
                specs[k] = packed.spec(v.value, tuple(specs[k]))
            except Dense as reason:
                operands[k : k + 1] = _plain([v], eqn, (at, -1, k), scope, str(reason))

    def fn(*arrays: Any) -> tuple[Any, ...]:
        args = [
            dataclasses.replace(v, value=array, picks=forget(v.picks)) if isinstance(v, Weight) else array
            for v, array in zip(operands, arrays, strict=True)
        ]
        return tuple(_plain(run(args, inner)[0], eqn, (at, -2), scope, "returns it"))

    mapped = jax.shard_map(
        fn,
        mesh=eqn.params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(eqn.params["out_specs"]),
        check_vma=eqn.params["check_vma"],
        axis_names=eqn.params["newly_manual_axes"],
    )
    return list(mapped(*_values(operands))), {}


RULES: dict[str, Rule] = {
    "jit": _jit,
    "closed_call": _inline,
    "eval_jaxpr": _inline,
    "custom_jvp_call": _inline,
    "custom_vjp_call": _inline,
    "remat2": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}


def _plain(
    values: Sequence[Any], eqn: Any, at: Place, scope: Scope, reason: str, keep: Collection[int] = ()
) -> list[Any]:
    """The values with all weights decoded, but those at the positions to keep. Negative places are no equation's."""
    return [
        scope.decode(v, (*at, k), eqn.primitive.name, reason) if is_followed(v) and k not in keep else v
        for k, v in enumerate(values)
    ]


def _values(operands: Sequence[Any]) -> list[Any]:
    return [v.value if isinstance(v, Weight) else v for v in operands]


def _unchanged(carry: Sequence[Any], invars: Sequence[Any], outvars: Sequence[Any]) -> set[int]:
    """Which carried weights the body hands on as they are."""
    return {k for k, v in enumerate(carry) if isinstance(v, Weight) and invars[k] is outvars[k]}


def _moving(carry: Sequence[Any], fixed: set[int], outvars: Sequence[Any]) -> list[Any]:
    """The rest of the carry, in the types that the program gives it."""
    typed = zip(carry, outvars[: len(carry)], strict=True)
    return [_typed(v, var.aval.dtype) for k, (v, var) in enumerate(typed) if k not in fixed]


def _typed(value: Any, dtype: Any) -> Any:
    return value if getattr(value, "dtype", None) == dtype else jnp.asarray(value, dtype)


def _merge(carry: Sequence[Any], fixed: set[int], moving: Sequence[Any]) -> list[Any]:
    """The whole carry from the weights that stay and the values that move."""
    rest = iter(moving)
    return [v if k in fixed else next(rest) for k, v in enumerate(carry)]


def _steps(value: Any, eqn: Any, at: Place, scope: Scope) -> Any:
    """A scanned operand; a weight stays packed if its blocks do not run along the axis that is stepped over."""
    if isinstance(value, Joined):
        reason = f"steps over {len(value.parts)} weights that the program joins: keep them stacked in params"
        return _plain([value], eqn, at, scope, reason)[0]
    if isinstance(value, Weight) and value.packed and 0 in packed.quantized_axes(value.value):
        return _plain([value], eqn, at, scope, "steps along the quantized axis")[0]
    return value


def _one_step(whole: Any, array: Any, level: int) -> Any:
    """One step of a scanned operand: a weight loses its first axis."""
    if not isinstance(whole, Weight):
        return array
    picks, axes = whole.picks, whole.axes[1:]
    if is_picked(whole.axes[0]):
        return dataclasses.replace(whole, value=array, axes=axes, picks=forget(picks, whole.axes[0]))
    gone = tuple(label[0] for label in whole.axes[0])
    scanned, levels = (*whole.scanned, *gone), (*whole.levels, *(level for _ in gone))
    return dataclasses.replace(whole, value=array, axes=axes, scanned=scanned, levels=levels)
