"""How long a rotation takes: the randomized Hadamard transform in factors against a product with the dense matrix.

    qjax run configs/bench_hadamard.toml

Both rotate the same float32 matrix in full precision in this process, in turn, `rounds` times. The dense product takes
only `dense_rows` of the rows, its time is scaled to all of them, and the table says so; a ratio is of the two times of
one round. Other jobs on the machine slow both.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from qjax import rundir
from qjax.errors import UserError
from qjax.reparam.hadamard import factors, randomized
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The matrices and the contest."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 14336),)  # (rows, n): n is rotated
    dense_rows: int = 512  # that the dense product is timed on
    rounds: int = 5
    seed: int = 0


def run(config: Config, out: Path) -> dict[str, Any]:
    """Time both on every shape; returns the rows."""
    if config.rounds < 1 or config.dense_rows < 1:
        raise UserError("rounds and dense_rows must be at least 1")
    rows = [contest(config, *shape, out) for shape in config.shapes]
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table(rows))
    return {"rows": rows, "machine": rundir.machine()}


def contest(config: Config, rows: int, n: int, out: Path) -> dict[str, Any]:
    """Both on one shape, in turn."""
    x = jnp.asarray(np.random.default_rng(config.seed).standard_normal((rows, n), np.float32))
    Q = jax.block_until_ready(randomized(jnp.eye(n, dtype=jnp.float32), config.seed).T)
    few = min(config.dense_rows, rows)
    part = x[:few]
    compiled, fast = seconds_of(lambda: randomized(x, config.seed))
    _, dense = seconds_of(lambda: product(part, Q))  # compiles
    error = float(jnp.max(jnp.abs(fast[:few] - dense)))
    del fast, dense
    runs = []
    for _ in range(config.rounds):
        first, _ = seconds_of(lambda: randomized(x, config.seed))
        second, _ = seconds_of(lambda: product(part, Q))
        scaled = second * rows / few
        runs.append({"seconds": first, "dense_seconds": scaled, "ratio": scaled / first})
        rundir.log(out, {"shape": [rows, n], **runs[-1]})
        print(f"{rows} x {n}: {runs[-1]}", file=sys.stderr)
    return {
        "shape": [rows, n], "factors": list(factors(n)), "dense_rows_timed": few,
        "dense_seconds_are": "measured" if few == rows else f"measured on {few} rows and scaled by {rows / few:g}",
        **{key: statistics.median(r[key] for r in runs) for key in runs[0]},
        "runs": runs, "first_call_seconds": compiled, "largest_difference": error,
    }  # fmt: skip


def seconds_of(f: Callable[[], Array]) -> tuple[float, Array]:
    """Wall time and result."""
    clock = time.perf_counter()
    y = f().block_until_ready()
    return time.perf_counter() - clock, y


@jax.jit
def product(x: Array, Q: Array) -> Array:
    """x Q^T in full precision."""
    return lax.dot_general(x, Q, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST)


def table(rows: list[dict[str, Any]]) -> Table:
    """For `rich.print`."""
    made = Table()
    for column in ("shape", "factors", "transform, s", "dense, s", "ratio", "dense times are"):
        made.add_column(column, justify="right" if column.endswith((", s", "ratio")) else "left")
    for r in rows:
        made.add_row(
            " x ".join(map(str, r["shape"])), " x ".join(map(str, r["factors"])), f"{r['seconds']:.2f}",
            f"{r['dense_seconds']:.1f}", f"{r['ratio']:.1f}", r["dense_seconds_are"],
        )  # fmt: skip
    return made
