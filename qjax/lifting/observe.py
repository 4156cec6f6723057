"""Look at a function's weights at work: where each is used, and what flows into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from qjax.errors import UserError
from qjax.lifting.picked import each_entry
from qjax.lifting.run import matrices, run, survey, trace
from qjax.lifting.scope import Interpretation, Place, Site, Stats
from qjax.lifting.weight import Use


def report(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> tuple[Use, ...]:
    """Every use of every leaf of params, in the order of execution, from an abstract trace.

    Args:
      fn: a pure function of (params, *args, **kwargs).
      params: arrays, QTensors or shapes.
      *args, **kwargs: its inputs, or their shapes.

    Returns: one `Use` per equation that uses a leaf; those inside a scan once. A leaf that is never used is absent.

    >>> import jax.numpy as jnp
    >>> for use in report(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))},
    ...                   jnp.ones((3, 4))):
    ...     print(use.path, use.kind, use.axis, use.source)
    a dot -2 0
    b dot -2 1
    """
    return tuple(survey(trace(fn, params, args, kwargs)).uses.values())


def watch(fn: Callable[..., Any], collect: Callable[[Use, Any], Any]) -> Callable[..., tuple[Any, Stats]]:
    """Run a function and collect statistics of what flows into its weights.

    Args:
      fn: a pure function of (params, *inputs); params dense or packed.
      collect: (use, x) -> a tree of arrays, or None; called once for each source (again if JAX traces a body again).
        For a dot, x is the activation with its contracted axes last and merged, the axes it shares with the weight
        (batch axes of the dot_general) first: [*batch, *tokens, n]. For a gather, x is the integer indices.

    Returns: a function of (params, *inputs) that returns (output, {source: statistic}), sources as in `report`. In a
      scan the statistics are stacked on a leading axis; a branch of a cond that is not taken gives zeros. Those of a
      weight that is picked from a stack by an index (experts) are stacked on the axes `use.picked`: `collect` sees
      x [*batch, *picked, *tokens, n] with zeros for the tokens that go elsewhere, once for each entry.

    Raises:
      UserError: (when called) a statistic arises in a while loop or a shard_map, which it cannot leave, or at a weight
        of a stack of which nobody knows the entry.
    """

    def watched(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Stats]:
        first: dict[int, Place] = {}

        def visit(site: Site) -> tuple[Any, Stats]:
            if first.setdefault(site.use.source, site.place) != site.place:
                return site.y, {}
            stat = _of_entries(collect, site)
            if site.inside and jax.tree.leaves(stat):
                raise UserError(
                    f"the input of {site.use.path!r} is used in a {site.inside}, which no statistic can leave"
                )
            return site.y, {site.use.source: stat}

        return run(trace(fn, params, args, kwargs), Interpretation(visit=visit), matrices)

    return watched


def _of_entries(collect: Callable[[Use, Any], Any], site: Site) -> Any:
    """The statistic of a use, for each entry of a stack that the use picks from."""
    use = site.use
    if site.entries is None:
        if jax.tree.leaves(collect(use, site.x)):
            raise UserError(
                f"{use.path!r} {list(use.shape)}: {use.primitive} takes entries of its stack, and which cannot be "
                "followed; index the stack itself, w[i], or keep the weight and leave it out of the statistics"
            )
        return None
    sizes = [use.shape[axis] for axis in use.picked]
    return each_entry(lambda x: collect(use, x), site.x, site.entries, sizes, use.batch)
