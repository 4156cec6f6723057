"""Run a function on packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qjax.lifting.run import packed_only, run, trace
from qjax.lifting.scope import Interpretation


def lift(fn: Callable[..., Any], *, strict: bool = True) -> Callable[..., Any]:
    """Let a function of dense params run on packed ones.

    Args:
      fn: any pure function of (params, *inputs), e.g. a flax module's apply.
      strict: raise where a packed weight would be decoded outside of a dot or a lookup; otherwise decode that one
        weight there, with a warning.

    Returns: the same function, for params with QTensors in place of arrays. Every dot_general of an activation with a
      QTensor goes through `qjax.dot`, looked-up rows are decoded alone, results keep their types.

    Raises:
      UserError: (when called, strict) a packed weight cannot stay packed; names the weight, the primitive and why.

    >>> import jax.numpy as jnp, qjax
    >>> q = qjax.quantize(jnp.ones((32, 4)), "Q8_0", axis=0)
    >>> lift(lambda params, x: x @ params["w"])({"w": q}, jnp.ones((2, 32))).shape
    (2, 4)
    """

    def lifted(params: Any, *args: Any, **kwargs: Any) -> Any:
        program = Interpretation(on_dense="raise" if strict else "warn")
        return run(trace(fn, params, args, kwargs), program, packed_only)[0]

    return lifted
