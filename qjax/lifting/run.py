"""From a function of (params, *inputs) to its jaxpr, and through the interpreter back to its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.lifting import jax_names
from qjax.lifting.interpret import interpret
from qjax.lifting.joined import is_followed
from qjax.lifting.scope import Interpretation, Scope, Stats
from qjax.lifting.weight import Weight, as_weight
from qjax.tensor import is_qtensor

# Which leaves of params the interpreter follows, as weights: a function of path and leaf, None for those it does not.
Tag = Callable[[str, Any], Weight | None]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function traced on the shapes of its arguments.

    Attributes:
      jaxpr: the plain function; a packed weight enters it as a dense array of the type that it had.
      out_tree: the structure of its output.
      leaves: the arrays and QTensors of params and inputs, one for each of the jaxpr's inputs.
      paths: the name of each leaf of params; None for those of inputs.
    """

    jaxpr: Any
    out_tree: Any
    leaves: Sequence[Any]
    paths: tuple[str | None, ...]


def trace(fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """Trace fn(params, *args, **kwargs). Leaves that are no arrays (flags, None, numbers) reach `fn` as they are."""
    named, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    inputs, input_tree = jax.tree.flatten((args, dict(kwargs)))
    everything = [leaf for _, leaf in named] + inputs
    moving = [i for i, leaf in enumerate(everything) if _is_array(leaf)]

    def plain(*arrays: Any) -> Any:
        filled = list(everything)
        for i, array in zip(moving, arrays, strict=True):
            filled[i] = array
        inner_args, inner_kwargs = jax.tree.unflatten(input_tree, filled[len(named) :])
        return fn(jax.tree.unflatten(tree, filled[: len(named)]), *inner_args, **inner_kwargs)

    leaves = [everything[i] for i in moving]
    dense = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_qtensor(leaf) else leaf for leaf in leaves]
    jaxpr, out = jax_names.trace(plain, *dense)
    paths = tuple(
        jax.tree_util.keystr(named[i][0], simple=True, separator="/") if i < len(named) else None for i in moving
    )
    return Traced(jaxpr, jax.tree.structure(out), leaves, paths)


def run(traced: Traced, program: Interpretation, tag: Tag, feed: Mapping[str, Any] | None = None) -> tuple[Any, Stats]:
    """Interpret a traced function on its leaves.

    Args:
      traced: the function and its arguments.
      program: what happens at each use.
      tag: which leaves are followed as weights.
      feed: arrays for the visitor.

    Returns: the function's output and the visitor's statistics by source.
    """
    args = [
        leaf if path is None else tag(path, leaf) or leaf
        for path, leaf in zip(traced.paths, traced.leaves, strict=True)
    ]
    scope = Scope(program, traced.jaxpr, feed=dict(feed or {}))
    outs, stats = interpret(args, scope)
    outs = [
        scope.decode(v, (len(traced.jaxpr.eqns), k), "the function", "returns it") if is_followed(v) else v
        for k, v in enumerate(outs)
    ]
    return jax.tree.unflatten(traced.out_tree, outs), stats


def survey(traced: Traced, visit: Any = lambda site: (site.y, {}), tag: Tag | None = None) -> Interpretation:
    """Interpret on shapes alone; the ledger of uses is in the program that comes back."""
    program = Interpretation(visit=visit, on_dense="note")
    jax.eval_shape(
        lambda leaves: run(dataclasses.replace(traced, leaves=leaves), program, tag or every_float), traced.leaves
    )
    return program


def every_float(path: str, leaf: Any) -> Weight | None:
    """Tag every leaf of floats."""
    return as_weight(path, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else None


def matrices(path: str, leaf: Any) -> Weight | None:
    """Tag every leaf of floats with two or more axes, packed or not."""
    return every_float(path, leaf) if len(leaf.shape) > 1 else None


def packed_only(path: str, leaf: Any) -> Weight | None:
    """Tag the packed leaves."""
    return as_weight(path, leaf) if is_qtensor(leaf) else None


def _is_array(leaf: Any) -> bool:
    return is_qtensor(leaf) or isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
