"""Products with packed weights against dense bfloat16 and float32 ones, on the same shapes, in one process.

Each program multiplies x with `count` matrices, one after another, that together take more memory than caches hold; a
time is that of one of them. The error is the largest difference from the product in float64, over its largest result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.bench.clock import Roof, roof, seconds
from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.kernels import PLATFORMS, Call, choice
from qjax.kernels.dispatch import ELSEWHERE, Implementation, running_on
from qjax.tensor import check_length, dequantize, dot, is_qtensor, quantize
from qjax.typing import Array

Shape = tuple[int, int]
DENSE = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
_SIDE = {"cpu": 1024}  # of the product that the peak is measured by; elsewhere:
_LARGE_SIDE = 8192
_CHECKED = 512  # rows of weights whose results are compared with float64


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is timed.

    Attributes:
      formats: of the weights.
      shapes: (out, in) of the matrices.
      rows: of x.
      dtype: of x: "float32" or "bfloat16".
      implementation: of the kernels, as `qjax.dot` takes it.
      cold_bytes: of all matrices of a program; more than caches hold.
      rounds: calls that are timed; the median counts.
      seed: of weights and x.
    """

    formats: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    dtype: str = "float32"
    implementation: Implementation = "auto"
    cold_bytes: int = 64 << 20
    rounds: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        if min((1, *self.rows, *(n for shape in self.shapes for n in shape), self.rounds, self.cold_bytes)) < 1:
            raise UserError("rows, shapes, rounds and the bytes of weights must be at least 1")
        if self.dtype not in DENSE:
            raise UserError(f"dtype {self.dtype!r}; expected one of {', '.join(DENSE)}")
        for name in self.formats:
            fmt = get_format(name)
            if fmt.rows != 1:
                raise UserError(f"{fmt.name}: rows of a matrix share scales, and none can be moved to make another")
            for shape in self.shapes:
                check_length(fmt, shape[1], f"shape {shape[0]} x {shape[1]}")


def contest(c: Contest) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of rows of x and format, behind those of dense bfloat16 and float32 weights.

    Returns: rows with `name`, `out`, `in`, `rows`, `kernel`, `seconds`, `gb_per_second`, `of_copy` (of the bandwidth
      that a copy reached), `over_bfloat16` (times faster), `error`, and the roofline's columns.
    """
    top = roof(2 * c.cold_bytes, _SIDE.get(running_on(), _LARGE_SIDE), DENSE[c.dtype], c.rounds)
    for shape in c.shapes:
        w = jnp.asarray(np.random.default_rng(c.seed).standard_normal(shape, np.float32))
        for m in c.rows:
            x = jnp.asarray(np.random.default_rng(c.seed + 1).standard_normal((m, shape[1]), np.float32))
            base = 0.0
            for name, dtype in DENSE.items():
                row = _timed(c, name, "dense", w.astype(dtype), x.astype(dtype), top)
                base = base or row["seconds"]
                yield row | {"over_bfloat16": base / row["seconds"]}
            for name in c.formats:
                row = _timed(c, name, _kernel(c, name, shape, m), quantize(w, name), x.astype(DENSE[c.dtype]), top)
                yield row | {"over_bfloat16": base / row["seconds"]}


def _timed(c: Contest, name: str, kernel: str, w: Any, x: Array, top: Roof) -> dict[str, Any]:
    """A row: one matrix's time in a program over many."""

    def one(x: Array, w: Any) -> Array:
        return dot(x, w, c.implementation) if is_qtensor(w) else x @ w.T

    (out, n), m = w.shape, x.shape[0]
    count = max(2, -(-c.cold_bytes // w.nbytes))
    many = jax.tree.map(lambda leaf: jnp.stack([jnp.roll(leaf, k, axis=0) for k in range(count)]), w)
    each = jax.jit(lambda x, many: lax.scan(lambda none, w: (none, one(x, w)), None, many)[1])
    time = seconds(each, x, many, rounds=c.rounds) / count
    flops, moved = 2 * m * out * n, w.nbytes + x.nbytes + m * out * x.dtype.itemsize
    return {
        "name": name, "out": out, "in": n, "rows": m, "kernel": kernel, "seconds": time,
        "gb_per_second": moved / time / 1e9, "of_copy": moved / time / top.bytes, "error": _error(one, x, w),
        "flops": flops, "bytes": moved, "peak_flops": top.flops, "peak_bytes": top.bytes,
    }  # fmt: skip


def _error(one: Callable[[Array, Any], Array], x: Array, w: Any) -> float:
    """The largest difference from the product in float64, of the first rows of weights, over its largest result."""
    some = jax.tree.map(lambda leaf: leaf[:_CHECKED], w)
    exact = np.asarray(x, np.float64) @ np.asarray(dequantize(some) if is_qtensor(some) else some, np.float64).T
    return float(np.max(np.abs(np.asarray(one(x, some), np.float64) - exact)) / np.max(np.abs(exact)))


def _kernel(c: Contest, name: str, shape: Shape, m: int) -> str:
    """Which kernel the table names."""
    platform, call = running_on(), Call(get_format(name), shape, m, jnp.dtype(c.dtype))
    found = choice(call, platform, c.implementation)[0] if platform in PLATFORMS else None
    return found.name if found else ELSEWHERE.name
