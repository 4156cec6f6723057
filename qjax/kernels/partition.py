"""How a product with packed weights is cut over a mesh: where the weights lie, there they are multiplied with.

    x [*s, m, n]  leaf [*s, *o, G, ...]  ->  y [*s, m, *o]       s, m, *o: cut, nothing moves
                                                                 G: blocks of a file cut, with x's n; y is summed over
                                                                 the rest: whole on each device

Left to itself XLA brings the rows that a loop takes one after another to every device, and it cannot see into a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from qjax.errors import UserError
from qjax.formats.protocol import BlockFormat, Format, Leaves
from qjax.typing import Array

Run = Callable[[Array, Leaves], Array]


def over_a_mesh(format: Format, stack: int, run: Run) -> Run:
    """`run` as an operation that a mesh may cut.

    Args:
      format: of the leaves.
      stack: how many axes *s there are.
      run: (x, leaves) -> y on one device.
    """
    names = [f"s{k}" for k in range(stack)]
    blocks = isinstance(format, BlockFormat)

    def rule(mesh: Any, values: Any, results: Any) -> Any:
        """Shardy's: a name for each axis, of which those behind "need replication" are not cut."""
        outer = [f"o{k}" for k in range(len(results[0].shape) - stack - 1)]
        own, whole, operands = outer if format.rows else [], ["e" if blocks else "n"], []
        for k, leaf in enumerate(values[1:]):
            rest = [f"l{k}x{j}" for j in range(len(leaf.shape) - stack - len(own))]
            rest = ["g", *rest[1:]] if blocks else rest
            whole += [name for name in rest if name != "g"]
            operands.append(" ".join([*names, *own, *rest]))
        x = " ".join([*names, "m", "(g e)" if blocks else "n"])
        return f"{x}, {', '.join(operands)} -> {' '.join([*names, 'm', *outer])}", {
            "reduction_factors": ("g",) if blocks else (),
            "need_replication_factors": (*whole, *(() if own else outer)),  # in the order in which they are named
            **({"e": format.block} if blocks else {}),
        }

    def partition(mesh: Any, args: Any, result: Any) -> Any:
        if mesh.empty:
            raise UserError(
                f"{format.name} weights lie on several devices without a mesh: place them by a NamedSharding"
            )
        x, leaves = args
        first = jax.tree.leaves(leaves)[0]
        spec = _entries(first)
        count = len(result.shape) - stack - 1 if format.rows else 0
        pieces = math.prod(mesh.shape[name] for name in _names(spec[stack + count - 1])) if count else 1
        if count and result.shape[-1] // pieces % format.rows:  # rows of a tile lie together
            count = 0
        lead, outer = spec[:stack], spec[stack : stack + count]
        along = spec[stack + count] if blocks else None
        used = {name for entry in (*lead, *outer, along) for name in _names(entry)}
        m = tuple(name for name in _names(_entries(x)[stack]) if name not in used) or None
        summed = _names(along)

        def place(*entries: Any) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*entries))

        def local(x: Array, leaves: Leaves) -> Array:
            y = run(x, leaves)
            return lax.psum(y.astype(jnp.float32), summed).astype(y.dtype) if summed else y

        whole = (None,) * (len(result.shape) - stack - 1 - count)
        inputs = place(*lead, m, along), jax.tree.map(lambda leaf: place(*lead, *outer, along), leaves)
        return mesh, local, place(*lead, m, *outer, *whole), inputs

    cut = custom_partitioning(jax.jit(run))
    cut.def_partition(partition, sharding_rule=rule)
    return cut


def _entries(array: Any) -> tuple[Any, ...]:
    """An array's partition spec, one entry an axis."""
    spec = tuple(array.sharding.spec)
    return (*spec, *(None,) * (len(array.shape) - len(spec)))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
