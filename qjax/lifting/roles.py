"""What every leaf of a params tree is to a function: a matrix, a table, a bias, or whatever else; nothing is left out.

roles(apply, params, *inputs)      a table of every leaf, its role and the primitives that use it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.lifting.run import survey, trace
from qjax.lifting.weight import Use
from qjax.tables import html_table, text_table
from qjax.tensor import is_qtensor

# What a leaf is called that is combined with an activation number by number.
_BIAS, _GAIN = {"add", "add_any", "sub"}, {"mul", "div"}


@dataclasses.dataclass(frozen=True)
class Role:
    """What one leaf is used as.

    Attributes:
      path, shape: the leaf.
      role: "matrix" (contracted with activations), "table" (rows looked up), "kernel" (of a convolution), "bias",
        "gain", "other", "unused", or "no floats"; several of them joined by commas.
      axes: the stored axes along which it is contracted, or that looked-up rows run along.
      primitives: what uses it, each once.
      note: why a packed leaf cannot stay packed; "" if it can.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    axes: tuple[int, ...] = ()
    primitives: tuple[str, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of all leaves, in the order of the tree; prints as a table."""

    rows: tuple[Role, ...]

    def _table(self) -> tuple[Sequence[str], list[tuple[str, ...]]]:
        heads = ("path", "shape", "role", "axes", "primitives", "note")
        return heads, [
            (
                r.path, " x ".join(map(str, r.shape)), r.role, ", ".join(map(str, r.axes)), ", ".join(r.primitives),
                r.note,
            )
            for r in self.rows
        ]  # fmt: skip

    def __getitem__(self, path: str) -> Role:
        return {r.path: r for r in self.rows}[path]

    def __repr__(self) -> str:
        return text_table(*self._table())

    def _repr_html_(self) -> str:
        return html_table("Roles of the leaves", *self._table())


def roles(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Roles:
    """What every leaf of params is to a function, from an abstract trace.

    Args:
      fn: a pure function of (params, *args, **kwargs).
      params: arrays, QTensors or shapes.
      *args, **kwargs: its inputs, or their shapes.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((4, 8)), "b": jnp.ones(8), "steps": jnp.arange(3), "old": jnp.ones((2, 2))}
    >>> roles(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), params, jnp.ones((3, 4)))
    path   shape  role       axes  primitives   note
    b      8      bias             add
    old    2 x 2  unused
    steps  3      no floats
    w      4 x 8  matrix     -2    dot_general
    """
    found: dict[str, list[Use]] = {}
    for use in survey(trace(fn, params, args, kwargs)).uses.values():
        found.setdefault(use.path, []).append(use)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
    return Roles(tuple(_role(path, leaf, found.get(path, [])) for path, leaf in named))


def _role(path: str, leaf: Any, uses: Sequence[Use]) -> Role:
    shape = tuple(getattr(leaf, "shape", ()))
    if not uses:
        floats = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return Role(path, shape, "unused" if floats else "no floats")
    names = list(dict.fromkeys(_name(use) for use in uses))
    axes = tuple(dict.fromkeys(axis for use in uses for axis in use.axes))
    primitives = tuple(dict.fromkeys(use.primitive for use in uses))
    return Role(path, shape, ", ".join(names), axes, primitives, next((use.note for use in uses if use.note), ""))


def _name(use: Use) -> str:
    if use.kind != "other":
        return {"dot": "matrix", "gather": "table", "conv": "kernel"}[use.kind]
    return "bias" if use.primitive in _BIAS else "gain" if use.primitive in _GAIN else "other"
