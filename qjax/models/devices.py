"""Windows of a text, or rows of a weight, over all devices of all processes; results in the order of the parts.

    part j goes to process j mod P, there to device j // P        results go to the first device of every process

A part has the same shape wherever it runs, and its program is compiled for each device as for one alone: one that is
partitioned over several XLA optimizes in another order, and the last digits show it. What is summed over parts is added
in their order, by every process for itself. So the numbers are those of one device in one process, bit for bit. Weights
are copied to every device. What is left behind the last full round of steps, and a step shorter than the others, runs
on one device alone, in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.processes import of_all


def at_once() -> int:
    """How many parts are computed at a time: one on each device of each process."""
    return jax.process_count() * jax.local_device_count()


def each_step(
    program: Callable[..., Any], static: tuple[Any, ...], whole: Any, rows: Sequence[Any], steps: Sequence[slice]
) -> Iterator[tuple[slice, Any]]:
    """program(*static, *whole, *rows of a step) for every step, in order; as many at once as there are devices.

    With several processes each of them calls this with the same arguments, computes its share, and has all results.

    Args:
      program: jitted, its first arguments static.
      static, whole: the same for all steps; `whole` are trees of arrays.
      rows: arrays [windows, ...], or None; a step takes its windows of each.
      steps: slices of windows, none overlapping another.

    Returns: an iterator over (step, what `program` gives for it, on the first device).
    """
    processes, devices = jax.process_count(), jax.local_devices()
    groups = list(rounds(steps, processes * len(devices)))
    everywhere = [jax.device_put(whole, d) for d in devices] if any(len(g) > 1 for g in groups) else []

    def on(device: jax.Device, whole: Any, at: slice) -> Any:
        own = (None if a is None else jax.device_put(np.asarray(a[at]), device) for a in rows)
        return program(*static, *whole, *own)

    for group in groups:
        if len(group) == 1:
            yield group[0], program(*static, *whole, *(None if a is None else jnp.asarray(a[group[0]]) for a in rows))
            continue
        own = group[jax.process_index() :: processes]
        made = [on(devices[0], everywhere[0], own[0])]  # traced before the threads begin: each would for itself
        if len(own) > 1:  # which compile it for their devices, and start it
            with ThreadPoolExecutor(len(own) - 1) as pool:
                made += pool.map(on, devices[1:], everywhere[1:], own[1:])
        found = (one for each in made for one in in_order([jax.device_put(each, devices[0])]))
        yield from zip(group, found, strict=True)


def in_order(own: list[Any]) -> list[Any]:
    """Parts p, P + p, 2 P + p ... of each process p of P, on its first device: all, in order, for every process.

    Args:
      own: this process's, trees of arrays of the same shapes, as many as any other's.
    """
    processes, count = jax.process_count(), len(own)
    if processes == 1:
        return own
    every = of_all(jax.tree.map(lambda *parts: jnp.stack(parts), *own))
    return [jax.tree.map(lambda a, at=p * count + i: a[at], every) for i in range(count) for p in range(processes)]


def rounds(steps: Sequence[slice], count: int) -> Iterator[list[slice]]:
    """The steps in their order: `count` of one length at a time where there are so many, else one."""
    at = 0
    while at < len(steps):
        group = list(steps[at : at + count])
        alike = all(s.stop - s.start == group[0].stop - group[0].start for s in group)
        if len(group) < count or not alike:
            group = group[:1]
        yield group
        at += len(group)
