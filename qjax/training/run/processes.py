"""Several processes that run one program: how they meet, who writes files, and whole arrays for all.

    qjax run CONFIG.toml --out DIR --join HOST:PORT/2/0        on one machine
    qjax run CONFIG.toml --out DIR --join HOST:PORT/2/1        on the other
    qjax run CONFIG.toml --out DIR --join auto                 under a launcher that JAX knows

Every process runs the same steps on its own rows of each batch. Process 0 listens at HOST:PORT and writes the files;
DIR must be one that all of them see. With one process all of this does nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from qjax.errors import UserError

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
        _meet(name)
    yield
    if chief():
        _meet(name)


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


def _meet(name: str) -> None:
    # By the coordinator and not by a collective of the devices: these give up after half a minute on the CPU.
    ocp.multihost.get_barrier_sync_fn()(key=f"qjax {name}", timeout_ms=_PATIENCE_MS)
