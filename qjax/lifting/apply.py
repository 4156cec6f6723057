"""Run a function on packed weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qjax.lifting.jax_names import outside
from qjax.lifting.run import packed_only, run, trace
from qjax.lifting.scope import Interpretation


def lift(fn: Callable[..., Any], *, strict: bool = True) -> Callable[..., Any]:
    """Let a function of dense params run on packed ones.

    Args:
      fn: any pure function of (params, *inputs), e.g. a flax module's apply.
      strict: raise where a packed weight would be decoded outside of a dot or a lookup; otherwise decode that one
        weight there, with a warning.

    Returns: the same function, for params with QTensors in place of arrays. Every dot_general of an activation with a
      QTensor goes through `qjax.dot`, looked-up rows are decoded alone, results keep their types. Outside of jit it is
      compiled like a jitted function: once for each structure, shapes and types of its arguments, as long as `fn`
      lives; what `fn` closes over is that of the first call.

    Raises:
      UserError: (when called, strict) a packed weight cannot stay packed; names the weight, the primitive and why.

    >>> import jax.numpy as jnp, qjax
    >>> q = qjax.quantize(jnp.ones((32, 4)), "Q8_0", axis=0)
    >>> lift(lambda params, x: x @ params["w"])({"w": q}, jnp.ones((2, 32))).shape
    (2, 4)
    """

    def inline(params: Any, *args: Any, **kwargs: Any) -> Any:
        program = Interpretation(on_dense="raise" if strict else "warn")
        return run(trace(fn, params, args, kwargs), program, packed_only)[0]

    own = compiled(fn, strict)

    def lifted(params: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((params, args, kwargs))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        still = tuple(None if _is_array(leaf) else (leaf, type(leaf)) for leaf in leaves)  # True is not 1
        if not outside() or any(isinstance(leaf, jax.core.Tracer) for leaf in arrays) or not _hashable(still):
            return inline(params, *args, **kwargs)
        return own((tree, still), arrays)

    return lifted


# The compiled programs of a function, known by its identity, live as long as the function.
_COMPILED: dict[tuple[int, bool], Any] = {}


def compiled(fn: Callable[..., Any], strict: bool) -> Any:
    """The jitted interpretation of a function, the same for the same function: it is traced and compiled once for each
    structure, shapes and types of its arguments, and holds the function weakly.
    """
    key = id(fn), strict
    if key in _COMPILED:
        return _COMPILED[key]
    held: Any
    try:
        held = weakref.ref(fn)
    except TypeError:  # nobody would say when it is gone: the programs live with this one `lift`
        held = lambda: fn  # noqa: E731

    def interpreted(still: tuple[Any, tuple[Any, ...]], arrays: list[Any]) -> Any:
        tree, leaves = still
        rest = iter(arrays)
        params, args, kwargs = jax.tree.unflatten(tree, [next(rest) if x is None else x[0] for x in leaves])
        program = Interpretation(on_dense="raise" if strict else "warn")
        return run(trace(held(), params, args, kwargs), program, packed_only)[0]

    program = jax.jit(interpreted, static_argnums=0)
    if isinstance(held, weakref.ref):
        _COMPILED[key] = program
        weakref.finalize(fn, _COMPILED.pop, key, None).atexit = False
    return program


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
