"""Windows of a text over all devices: a step of windows each, results in the order of the steps.

    x [devices x batch, t, d], cut along its first axis by NamedSharding: device k computes step k, as one device would

A step has the same shape and the same program wherever it runs, and sums over steps are added in the steps' order: the
numbers are those of one device, bit for bit, whatever the number of devices. Weights are copied to every device. What
is left behind the last full round of steps, and a step shorter than the others, runs on one device alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = P("windows")


@lru_cache(maxsize=1)
def mesh() -> Mesh:
    """The devices of this process in a row."""
    return Mesh(np.array(jax.local_devices()), ("windows",))


def each_step(
    program: Callable[..., Any], static: tuple[Any, ...], whole: Any, rows: Sequence[Any], steps: Sequence[slice]
) -> Iterator[tuple[slice, Any]]:
    """program(*static, *whole, *rows of a step) for every step, in order; as many at once as there are devices.

    Args:
      program: jitted, its first arguments static.
      static, whole: the same for all steps; `whole` are trees of arrays.
      rows: arrays [windows, ...], or None; a step takes its windows of each.
      steps: slices of windows, none overlapping another.

    Returns: an iterator over (step, what `program` gives for it, on the first device).
    """
    here = mesh()
    groups = list(rounds(steps, here.size))
    everywhere = jax.device_put(whole, NamedSharding(here, P())) if any(len(g) > 1 for g in groups) else None
    for group in groups:
        if len(group) == 1:
            yield group[0], program(*static, *whole, *(None if a is None else jnp.asarray(a[group[0]]) for a in rows))
            continue
        span = slice(group[0].start, group[-1].stop)
        where = NamedSharding(here, ROWS)
        cut = tuple(None if a is None else jax.device_put(np.asarray(a[span]), where) for a in rows)
        found = spread(program, static)(everywhere, cut)
        for k, at in enumerate(group):
            yield at, jax.tree.map(lambda a, k=k: _shard(a, k), found)


@lru_cache(maxsize=64)
def spread(program: Callable[..., Any], static: tuple[Any, ...]) -> Callable[[Any, Any], Any]:
    """The program of one step on every device at once; results are stacked, device k's at k."""

    def one(whole: Any, rows: Any) -> Any:
        return jax.tree.map(lambda a: a[None], program(*static, *whole, *rows))

    return jax.jit(jax.shard_map(one, mesh=mesh(), in_specs=(P(), ROWS), out_specs=ROWS, check_vma=False))


def rounds(steps: Sequence[slice], count: int) -> Iterator[list[slice]]:
    """The steps in their order: `count` adjacent ones of one length at a time where there are so many, else one."""
    at = 0
    while at < len(steps):
        group = list(steps[at : at + count])
        alike = all(s.stop - s.start == group[0].stop - group[0].start for s in group)
        adjacent = all(a.stop == b.start for a, b in pairwise(group))
        if len(group) < count or not alike or not adjacent:
            group = group[:1]
        yield group
        at += len(group)


def _shard(a: jax.Array, k: int) -> jax.Array:
    """Row k of a stacked result, from device k to the first."""
    (data,) = (s.data for s in a.addressable_shards if s.index[0] == slice(k, k + 1, None))
    return jax.device_put(data, mesh().devices.flat[0])[0]
