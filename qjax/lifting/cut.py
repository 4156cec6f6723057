"""A function of (params, x) in pieces, cut between the uses of its weights where the fewest numbers pass.

    fn(params, x) = rest_k(params, *live_k)        live_0 = (x,)        live_{k+1} = step_k(params, *live_k)

What was computed from x once is carried along, so that all uses can be looked at in the time of one run. What depends
on params alone is not carried: each piece computes what it needs. Weights may change between the pieces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from qjax.errors import UserError
from qjax.lifting.jax_names import Literal, bind, consts, placed
from qjax.lifting.run import survey, trace
from qjax.tensor import is_qtensor

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What begins at a cut.

    Attributes:
      rest: (params, *live) -> the function's output.
      step: (params, *live) -> what is live at the next cut; the last piece has none.
      live: the shapes of what is live here for one row of x, its axis of rows first, as they are handed in.
      groups: which of the function's inputs of dots, counted in the order of `report`, are to be looked at here.
    """

    rest: Callable[..., Any]
    step: Callable[..., tuple[Any, ...]] | None
    live: tuple[Shape, ...]
    groups: tuple[int, ...]


def cut(fn: Callable[..., Any], params: Any, x: Any) -> tuple[Piece, ...]:
    """The pieces of fn, one a group of dots that read the same input, where there is a place to cut.

    Args:
      fn: a pure function of (params, x) that does the same to each row of x, whatever their number.
      params: arrays, QTensors or shapes.
      x: an array or a shape, its first axis that of rows. Values of which the number of rows is no leading part of the
        shape are not carried: there is no cut where one would have to be.

    Returns: at least one piece. Equal arguments give the same pieces, so programs of them are compiled once.

    Raises:
      UserError: (when a piece runs) fn is another program for so many rows.

    >>> import jax.numpy as jnp
    >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    >>> params, x = {"a": jnp.eye(4), "b": jnp.ones((4, 2))}, jnp.arange(12.0).reshape(3, 4)
    >>> first, second = cut(fn, params, x)
    >>> bool(jnp.all(second.rest(params, *first.step(params, x)) == fn(params, x)))
    True
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=is_qtensor)
    shapes = tuple(Shape(leaf.shape, leaf.dtype) for leaf in leaves)
    return _cut(fn, tree, shapes, x.shape[1:], np.dtype(x.dtype))


@lru_cache(maxsize=64)
def _cut(fn: Callable[..., Any], tree: Any, shapes: tuple[Shape, ...], row: tuple[int, ...], dtype: Any) -> Any:
    params = jax.tree.unflatten(tree, shapes)

    @lru_cache(maxsize=8)
    def traced(rows: int) -> Any:
        return trace(fn, params, (Shape((rows, *row), dtype),), {})

    one, two = traced(1).jaxpr, traced(2).jaxpr
    groups: list[list[int]] = [[]]
    lives, end = [[_input(one)]], -1
    for k, (first, last) in enumerate(_spans(traced(1))):
        live = _narrowest(one, two, range(end + 1, first + 1)) if k else None
        if live is not None:
            groups.append([])
            lives.append(live)
        groups[-1].append(k)
        end = max(end, last)

    def values(params: Any, start: list[Name], live: Sequence[Any], wanted: list[Name] | None) -> list[Any]:
        jaxpr = traced(live[0].shape[0]).jaxpr
        if _primitives(jaxpr) != _primitives(one):
            raise UserError(f"{fn} does other things to {live[0].shape[0]} rows than to one, and cannot be cut")
        known = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_qtensor) if hasattr(leaf, "shape")]
        env = dict(zip(jaxpr.invars[:-1], known, strict=True))
        env |= {_at(v, jaxpr): _merged(a, _at(v, one).aval.ndim) for v, a in zip(start, live, strict=True)}
        return _evaluated(jaxpr, env, jaxpr.outvars if wanted is None else [_at(v, jaxpr) for v in wanted])

    def piece(start: list[Name], end: list[Name] | None, groups: list[int]) -> Piece:
        def rest(params: Any, *live: Any) -> Any:
            return jax.tree.unflatten(traced(1).out_tree, values(params, start, live, None))

        def step(params: Any, *live: Any) -> tuple[Any, ...]:
            assert end is not None
            return tuple(a.reshape(len(live[0]), -1, *a.shape[1:]) if _at(v, one).aval.shape[0] > 1 else a
                         for v, a in zip(end, values(params, start, live, end), strict=True))  # fmt: skip

        shapes = (_at(v, one).aval for v in start)
        live = tuple(Shape(a.shape if a.shape[0] == 1 else (1, *a.shape), a.dtype) for a in shapes)
        return Piece(rest, None if end is None else step, live, tuple(groups))

    return tuple(map(piece, lives, [*lives[1:], None], groups))


# A variable by where it is made, which is the same for any number of rows: (equation, result), or (-1, n), an input.
Name = tuple[int, int]


def _input(jaxpr: Any) -> Name:
    return -1, len(jaxpr.invars) - 1


def _at(name: Name, jaxpr: Any) -> Any:
    at, k = name
    return jaxpr.invars[k] if at < 0 else jaxpr.eqns[at].outvars[k]


def _merged(a: Any, ndim: int) -> Any:
    """A live value as the function has it: several entries of its first axis may belong to one row of x."""
    return a if a.ndim == ndim else a.reshape(-1, *a.shape[2:])


def _primitives(jaxpr: Any) -> list[str]:
    return [eqn.primitive.name for eqn in jaxpr.eqns]


def _spans(traced: Any) -> list[tuple[int, int]]:
    """The outermost equations that hold the first and the last dot of each source, sources in order."""
    found: dict[int, list[int]] = {}
    for place, use in survey(traced).uses.items():
        if use.kind == "dot":
            found.setdefault(use.source, []).append(place[0])
    return [(min(at), max(at)) for at in found.values()]


def _narrowest(one: Any, two: Any, places: range) -> list[Name] | None:
    """What is live at the cut, behind so many equations, where that is the least; the last of several."""
    if _primitives(one) != _primitives(two):
        return None
    lives = [v for c in places if (v := _live(one, two, c)) is not None]
    sizes = [sum(math.prod(_at(v, one).aval.shape) * _at(v, one).aval.dtype.itemsize for v in live) for live in lives]
    return lives[len(sizes) - 1 - sizes[::-1].index(min(sizes))] if lives else None


def _live(one: Any, two: Any, c: int) -> list[Name] | None:
    """What of x is needed behind the first c equations; None where it cannot be carried row by row."""
    names: dict[Any, Name] = {one.invars[-1]: _input(one)}
    for i, eqn in enumerate(one.eqns):
        if any(not isinstance(v, Literal) and v in names for v in eqn.invars):
            names |= {v: (i, k) for k, v in enumerate(eqn.outvars)}
    needed = {v for v in one.outvars if not isinstance(v, Literal)}
    for eqn in reversed(one.eqns[c:]):
        if needed.intersection(eqn.outvars):
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    live = sorted(names[v] for v in needed if v in names and names[v][0] < c)
    for name in live:
        a, b = _at(name, one).aval.shape, _at(name, two).aval.shape
        if not a or b != (2 * a[0], *a[1:]):
            return None
    return live or None


def _evaluated(jaxpr: Any, env: dict[Any, Any], wanted: list[Any]) -> list[Any]:
    """Some variables' values from those of others: the equations between, and no more."""
    env = dict(zip(jaxpr.constvars, consts(jaxpr), strict=True)) | env
    needed = {v for v in wanted if not isinstance(v, Literal)}
    chosen = []
    for eqn in reversed(jaxpr.eqns):
        made = [v for v in eqn.outvars if v in needed and v not in env]
        if made:
            chosen.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in reversed(chosen):
        with placed(eqn):
            outs = bind(eqn, [read(v) for v in eqn.invars])
        env |= {v: out for v, out in zip(eqn.outvars, outs, strict=True) if v not in env}
    return [read(v) for v in wanted]
