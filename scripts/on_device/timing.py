"""Seconds of a call: the first, with compilation, and the best of a few more."""

import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begun


def first_and_next(call: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    return seconds(call), min(seconds(call) for _ in range(times))


def each(call: Callable[[], Any], calls: int = 20, times: int = 5) -> float:
    """Of one call among many that are under way: what the device takes where dispatch does not hold it up."""

    def several() -> Any:
        return [call() for _ in range(calls)]

    jax.block_until_ready(several())
    return sorted(seconds(several) for _ in range(times))[times // 2] / calls
