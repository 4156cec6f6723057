"""Several processes that run one program: how they meet, who writes files, and what one has, for all.

    qjax run CONFIG.toml --out DIR --join HOST:PORT/2/0        on one machine
    qjax run CONFIG.toml --out DIR --join HOST:PORT/2/1        on the other
    qjax run CONFIG.toml --out DIR --join auto                 under a launcher that JAX knows
    qjax quantize MODEL -o DIR/FILE ... --join ...             the same

Every process runs the same steps, on its own rows of each batch or windows of a text. Process 0 listens at HOST:PORT
and writes the files; DIR must be one that all of them see. With one process all of this does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.errors import UserError, exit_status

_PATIENCE_MS = 3_600_000  # a large corpus is encoded meanwhile


def start_processes(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join this process with the others of the run; `jax.devices()` are those of all of them afterwards.

    To be called first of all, and only by who wants several processes.

    Args:
      coordinator: "host:port" at which process 0 listens.
      processes: how many there are.
      process: this one, from 0. All three may be left out under a launcher that JAX knows (Slurm, Open MPI, Cloud TPU,
        Kubernetes): its environment says them.

    Raises:
      UserError: only some of the three, none outside of a known launcher, JAX is in use already, or the others do not
        answer.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise UserError("several processes: give coordinator, processes and process, or none of them")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"cannot join the processes of this run: {str(e).splitlines()[0]}") from e


def join(line: str) -> None:
    """`start_processes` of "HOST:PORT/PROCESSES/PROCESS" or "auto".

    Raises:
      UserError: another line, or what `start_processes` raises.
    """
    if line == "auto":
        return start_processes()
    found = re.fullmatch(r"(.+:\d+)/(\d+)/(\d+)", line)
    if not found or not int(found[3]) < int(found[2]):
        raise UserError(f"join {line!r}: write HOST:PORT/PROCESSES/PROCESS, as in 10.0.0.1:1234/2/0, or auto")
    start_processes(found[1], int(found[2]), int(found[3]))


@contextlib.contextmanager
def joined(line: str | None) -> Iterator[None]:
    """`join` for a body; None: alone.

    A process whose body fails leaves without the goodbye that waits for the others: they learn that it is gone, where
    it was process 0 at once, else when its heartbeat has failed (JAX's 100 s), and end too.
    """
    if line is not None:
        join(line)
    try:
        yield
    except BaseException as e:
        if line is not None:
            atexit.register(os._exit, exit_status(e))
        raise


def chief() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def chief_first(name: str) -> Iterator[None]:
    """Process 0 runs the block, and when it has, the others: what it makes, they find.

    Args:
      name: of the block, which no other of the run has.
    """
    if not chief():
        meet(name)
    yield
    if chief():
        meet(name)


def by_chief(name: str, write: Callable[[], Any]) -> None:
    """Process 0 writes, and all go on when it has; see `chief_first`."""
    with chief_first(name):
        if chief():
            write()


def whole(tree: Any) -> Any:
    """A tree of arrays as each process has it for itself, without those that are distributed over several."""
    if jax.process_count() == 1:
        return tree

    def gathered(x: Any) -> Any:
        distributed = isinstance(x, jax.Array) and not x.is_fully_addressable
        return jnp.asarray(multihost_utils.process_allgather(x, tiled=True)) if distributed else x

    return jax.tree.map(gathered, tree)


def of_all(tree: Any) -> Any:
    """The arrays [k, ...] of every process, in the order of the processes: [processes * k, ...], on a device of each.

    Shapes and dtypes are the same in all of them.
    """
    if jax.process_count() == 1:
        return tree
    here, copied = _row()
    (mine,) = here.local_devices

    def put(a: Any) -> jax.Array:
        a = jax.device_put(a, mine)
        shape = (here.size * a.shape[0], *a.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(here, P("processes")), [a])

    meet("all")
    return jax.tree.map(lambda a: a.addressable_data(0), copied(jax.tree.map(put, tree)))


def of_chief(a: np.ndarray) -> np.ndarray:
    """Process 0's array, for all; the others give one of its shape and dtype."""
    return a if jax.process_count() == 1 else np.asarray(of_all(a[None])[0])


def said_by_chief(text: str) -> str:
    """Process 0's text, for all."""
    raw = np.frombuffer(text.encode(), np.uint8)
    size = int(of_chief(np.asarray(len(raw), np.int32)))
    return of_chief(raw if chief() else np.zeros(size, np.uint8)).tobytes().decode()


def check_alike(text: str, what: str) -> None:
    """Raise UserError where another process has another text; `what` says what it identifies."""
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    for process, other in enumerate(np.asarray(of_all(own[None]))):
        if not np.array_equal(other, own):
            raise UserError(
                f"processes {jax.process_index()} and {process} of this run differ in {what}: start them with the same "
                "options, files and versions, on as many cores"
            )


def meet(name: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() == 1:
        return
    import orbax.checkpoint as ocp  # which takes a second to import, and is for several processes only

    # By the coordinator and not by a collective of the devices: these give up after half a minute on the CPU.
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"qjax {name}", timeout_ms=_PATIENCE_MS)
    except jax.errors.JaxRuntimeError as e:
        e.add_note("another process of this run is gone: see what it said last; the same commands go on from here")
        raise


@lru_cache(maxsize=1)
def _row() -> tuple[Mesh, Callable[[Any], Any]]:
    """A device of each process, and the program that copies to all of them."""
    first = {d.process_index: d for d in reversed(jax.devices())}
    here = Mesh(np.array([first[p] for p in sorted(first)]), ("processes",))
    return here, jax.jit(lambda tree: tree, out_shardings=NamedSharding(here, P()))
