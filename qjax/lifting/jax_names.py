"""Every semi-public name of JAX that the interpreter needs, and how it differs between versions.

| what                              | jax 0.10                   | jax 0.11                           |
|-----------------------------------|----------------------------|------------------------------------|
| body of jit, scan, cond, while    | ClosedJaxpr                | Jaxpr, which carries its constants |
| body of remat2, shard_map         | Jaxpr without constants    | Jaxpr                              |
| inlined call                      | `closed_call`              | `eval_jaxpr`                       |
| scan's split of its operands      | `num_consts`, `num_carry`  | `ft_in`, a tree of three parts     |

When a new JAX renames something, this is the file to edit; `tests/lifting/test_jax_names.py` traces each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import source_info_util
from jax.extend.core import Literal, Var, get_opaque_trace_state, jaxprs_in_params

__all__ = [
    "BODIES",
    "JOINS",
    "LEAFWISE",
    "Literal",
    "Var",
    "bind",
    "body",
    "consts",
    "has_body",
    "keep_shardings",
    "outside",
    "placed",
    "scan_parts",
    "trace",
]

_OUTSIDE = get_opaque_trace_state(convention="flax")

# Primitives whose body is interpreted: name -> the parameter that holds the body.
BODIES = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
    "scan": "jaxpr",
    "while": "body_jaxpr",
    "cond": "branches",
}

# Primitives that put arrays behind one another; older versions stack by broadcast_in_dim and concatenate.
JOINS = {"concatenate", "stack"}

# Primitives that act on each array by itself and leave its values alone.
LEAFWISE = {"copy", "copy_p", "name", "optimization_barrier", "pvary", "stop_gradient"}


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """The jaxpr of fn(*args), with its constants, and its output as a tree of shapes."""
    return jax.make_jaxpr(fn, return_shape=True)(*args)


def outside() -> bool:
    """Whether no transformation is at work around the caller: no jit, grad, vmap or scan."""
    return get_opaque_trace_state(convention="flax") == _OUTSIDE


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on arrays, as JAX would: always a list of results."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def placed(eqn: Any) -> Any:
    """A context in which what is traced bears the names and the source line of an equation."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    return source_info_util.user_context(info.traceback, name_stack=stack)


def body(eqn: Any) -> Any:
    """The jaxpr inside an equation of BODIES (of `cond`: a tuple of them)."""
    return eqn.params[BODIES[eqn.primitive.name]]


def consts(jaxpr: Any) -> Sequence[Any]:
    """The values of jaxpr.constvars."""
    return getattr(jaxpr, "consts", ())


def has_body(eqn: Any) -> bool:
    """Whether an equation carries a jaxpr of its own."""
    return any(True for _ in jaxprs_in_params(eqn.params))


def scan_parts(eqn: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carried."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    constant, carry, _ = eqn.params["ft_in"].update(range(len(eqn.invars))).unpack()
    return len(list(constant)), len(list(carry))


def keep_shardings(eqn: Any, outs: Sequence[Any]) -> list[Any]:
    """Results of a jit's body under the `out_shardings` that the jit asked for."""
    shardings = eqn.params["out_shardings"]
    return [
        jax.lax.with_sharding_constraint(out, s) if isinstance(s, jax.sharding.Sharding) else out
        for out, s in zip(outs, shardings, strict=True)
    ]
