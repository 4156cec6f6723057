"""Options of a compiled program, where the default costs more than it gives, or gives less than it says.

XLA:GPU times several kernels for each product of matrices before it settles on one. A sweep over columns has dozens of
small products of their own shapes, and trying them out takes a minute where the whole program runs for a tenth of a
second. The CPU takes the option and has nothing to do with it.

A product of float32 arrays is no float32 product on a GPU or a TPU unless its precision is said: TF32 keeps 11 bits,
bfloat16 passes 8. What is measured, a statistic or a loss, is measured in full.

On a CPU XLA calls LAPACK, whose OpenBLAS has threads of its own; they spin while they wait for each other, beside
XLA's, which want the same cores: on busy ones a Cholesky factor waits far longer than it computes.

XLA's own threads cut long sums among them, so that the last digits of a result depend on how many there are, not on how
many cores they run on.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from threadpoolctl import threadpool_limits

Fn = TypeVar("Fn", bound=Callable[..., Any])

UNTUNED: dict[str, Any] = {"xla_gpu_autotune_level": 0}


def untuned(fn: Callable[..., Any], static_argnames: Iterable[str] = ()) -> Callable[..., Any]:
    """`jax.jit(fn)` whose products no GPU tunes. Inside another program, that one's options hold: JAX takes them
    from the outermost alone.

    >>> untuned(lambda x: x + 1)(jnp.float32(1)).item(), jax.jit(untuned(lambda x: x + 1))(1).item()
    (2.0, 2)
    """
    names = tuple(static_argnames)
    inner = jax.jit(fn, static_argnames=names)
    outer = jax.jit(fn, static_argnames=names, compiler_options=UNTUNED)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (inner if _in_a_trace(args, kwargs) else outer)(*args, **kwargs)

    vars(call).update(lower=outer.lower, trace=outer.trace, _cache_size=cast(Any, outer)._cache_size)
    return call


def full_float32(fn: Fn) -> Fn:
    """fn, with the products in it that do not say their precision at HIGHEST: goes under `jax.jit`."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return cast(Fn, call)


@contextlib.contextmanager
def lapack_on_one_thread() -> Iterator[None]:
    """A context, or a decorator: LAPACK keeps to the thread that calls it, in the whole process."""
    import scipy.linalg.cython_lapack  # noqa: F401  what XLA calls; only a library that is loaded can be told

    with threadpool_limits(1, user_api="blas"):
        yield


def workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


THREADS = 8
"""At least so many in a process of the command line: on as many cores and on fewer the bytes are the same."""


def threads() -> int:
    """XLA's threads on the CPU: $PJRT_NPROC, or one a core; and one a device at least."""
    said = os.environ.get("PJRT_NPROC", "")
    return max(int(said) if said.isdecimal() else workers(), jax.local_device_count())


def threads_whatever_the_cores() -> None:
    """Have XLA start as many threads on a small machine as on one of eight cores; before anything is computed."""
    os.environ.setdefault("PJRT_NPROC", str(max(THREADS, workers())))


def _in_a_trace(*values: Any) -> bool:
    """Whether any of the values is traced, or (all being concrete) a program around them is."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((values, jnp.zeros(()))))
