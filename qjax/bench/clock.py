"""How a program is timed, and what the machine can do at most: measured in the same process, as they change with it.

    bandwidth = 2 bytes / seconds of x <- x + 1, x larger than caches     peak = 2 n^3 / seconds of an n x n product

Times are medians over `rounds` calls, each waited for, behind one that compiles; roofs are of the fastest. What is
small is repeated within the program over weights of their own (`products`), so that neither a cache nor the call's own
cost is what is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qjax.typing import Array


def seconds(program: Callable[..., Any], *args: Any, rounds: int) -> float:
    """The median time of a call, behind one that compiles.

    Args:
      program: jitted.
      args: its arguments, on the device.
      rounds: calls that are timed.
    """
    jax.block_until_ready(program(*args))
    return statistics.median(_timed(lambda: program(*args)) for _ in range(rounds))


@dataclasses.dataclass(frozen=True)
class Roof:
    """What a machine can do at most: operations and bytes a second."""

    flops: float
    bytes: float


def roof(nbytes: int, side: int, dtype: Any, rounds: int) -> Roof:
    """The machine's roof as JAX reaches it.

    Args:
      nbytes: of the array that is read and written in its place; more than any cache holds.
      side: of the square matrices that are multiplied.
      dtype: theirs.
      rounds: calls that are timed.
    """
    place = [_raised(jnp.zeros(max(1, nbytes // 4), jnp.int32))]

    def copy() -> Array:
        place.append(_raised(place.pop()))
        return place[0]

    a = jnp.ones((side, side), dtype)
    jax.block_until_ready((_product(a), copy()))
    return Roof(
        flops=2 * side**3 / min(_timed(lambda: _product(a)) for _ in range(rounds)),
        bytes=2 * place[0].nbytes / min(_timed(copy) for _ in range(rounds)),
    )


def _timed(call: Callable[[], Any]) -> float:
    clock = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - clock


@functools.partial(jax.jit, donate_argnums=0)
def _raised(x: Array) -> Array:
    return x + 1


@jax.jit
def _product(a: Array) -> Array:
    return jnp.matmul(a, a, preferred_element_type=jnp.float32)
