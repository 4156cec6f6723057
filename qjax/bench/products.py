"""Products with packed weights against dense bfloat16 and float32 ones, on the same shapes, in one process.

Each program multiplies x with `count` matrices, one after another, that together take more memory than caches hold; a
time is that of one of them, in its kernel's layout already. The error is the largest difference from the product in
float64, over its largest result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.bench.clock import Roof, roof, seconds
from qjax.bench.rivals import Rival
from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.formats.vectors.grid import VectorGrid
from qjax.kernels import TABLE, Call, Kernel
from qjax.kernels.dispatch import chosen, running_on
from qjax.kernels.kernel import Implementation
from qjax.kernels.prepacked import laid_out
from qjax.tensor import QTensor, check_length, dequantize, quantize
from qjax.typing import Array

Shape = tuple[int, int]
Multiply = Callable[[Array, Any], Array]
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
      every: time all kernels that fit, not only the one that `dot` takes.
      rivals: other libraries' products, too (rivals.py).
    """

    formats: tuple[str, ...]
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    dtype: str = "float32"
    implementation: Implementation = "auto"
    cold_bytes: int = 64 << 20
    rounds: int = 7
    seed: int = 0
    every: bool = False
    rivals: tuple[Rival, ...] = ()

    def __post_init__(self) -> None:
        if min((1, *self.rows, *(n for shape in self.shapes for n in shape), self.rounds, self.cold_bytes)) < 1:
            raise UserError("rows, shapes, rounds and the bytes of weights must be at least 1")
        if self.dtype not in DENSE:
            raise UserError(f"dtype {self.dtype!r}; expected one of {', '.join(DENSE)}")
        for name in self.formats:
            fmt = get_format(name)
            if fmt.rows == 0:
                raise UserError(f"{fmt.name}: rows of a matrix share scales, and none can be moved to make another")
            for out, n in self.shapes:
                check_length(fmt, n, f"shape {out} x {n}")
                if out % fmt.rows:
                    raise UserError(f"{fmt.name} holds {fmt.rows} rows together, and got {out} (shape {out} x {n})")
        for rival in self.rivals:
            if why := rival.unfit(running_on()):
                raise UserError(f"{rival.name}: {why}; leave it out")
            for out, n in self.shapes:
                check_length(get_format(rival.format), n, f"shape {out} x {n}")


def contest(c: Contest) -> Iterator[dict[str, Any]]:
    """A row for each shape, number of rows of x and kernel of each format, behind those of dense weights.

    Returns: rows with `name`, `out`, `in`, `rows`, `kernel`, `seconds`, `gb_per_second`, `of_copy` (of the bandwidth
      that a copy reached), `over_bfloat16` (times faster), `error`, and the roofline's columns.

    Raises:
      UserError: a format that no kernel of the implementation takes here.
    """
    top = roof(8 * c.cold_bytes, _SIDE.get(running_on(), _LARGE_SIDE), DENSE[c.dtype], c.rounds)
    for shape in c.shapes:
        w = jnp.asarray(np.random.default_rng(c.seed).standard_normal(shape, np.float32))
        for m in c.rows:
            x = jnp.asarray(np.random.default_rng(c.seed + 1).standard_normal((m, shape[1]), np.float32))
            base = 0.0
            for row in _rows(c, w, x, top):
                base = base or row["seconds"]
                yield row | {"over_bfloat16": base / row["seconds"]}


def _rows(c: Contest, w: Array, x: Array, top: Roof) -> Iterator[dict[str, Any]]:
    """Of one shape and number of rows."""
    for name, dtype in DENSE.items():
        dense = w.astype(dtype)
        yield {"name": name, "kernel": "dense"} | _timed(c, _dense, x.astype(dtype), dense, dense, top)
    for name in c.formats:
        q = _packed(w, get_format(name), c.seed)
        for kernel in _kernels(c, Call(q.format, w.shape, len(x), jnp.dtype(c.dtype))):
            multiply = partial(_multiply, kernel, q.format)
            packed = laid_out(kernel.layout, q.format, q.leaves)
            row = _timed(c, multiply, x.astype(DENSE[c.dtype]), packed, dequantize(q), top)
            yield {"name": name, "kernel": kernel.name} | row
    for rival in c.rivals:
        q = quantize(w, rival.format)
        yield {"name": rival.format, "kernel": rival.name} | _rival_timed(c, rival, x, q, top)


def _packed(w: Array, format: Format, seed: int) -> QTensor:
    """The weights in a format; of vectors, random points: a search for the nearest takes longer than all that is
    timed, and a product does not depend on them."""
    if not isinstance(format, VectorGrid):
        return quantize(w, format)
    leaves = jax.eval_shape(lambda: quantize(w, format).leaves)
    drawn = np.random.default_rng(seed)
    codes = jnp.asarray(drawn.integers(0, 256, leaves["codes"].shape, np.uint8))
    return QTensor({**jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), leaves), "codes": codes}, format)


def _dense(x: Array, w: Array) -> Array:
    """x w^T as the platform does it best."""
    if running_on() == "cpu":  # x @ w.T would turn w in memory
        return lax.dot_general(w, x, (((1,), (1,)), ((), ()))).T
    return x @ w.T


def _kernels(c: Contest, call: Call) -> list[Kernel]:
    """The one that `dot` takes, or all that fit."""
    here = running_on()
    best = chosen(call, c.implementation)
    wanted = ("xla", "pallas") if c.implementation == "auto" else (c.implementation,)
    others = [k for k in TABLE if k.platform == here and k.implementation in wanted and not k.fits(call)]
    return [best, *(k for k in others if k is not best)] if c.every else [best]


def _multiply(kernel: Kernel, format: Format, x: Array, packed: Any) -> Array:
    return kernel.matmul(x, packed, format, None)


def _timed(c: Contest, multiply: Multiply, x: Array, packed: Any, w: Array, top: Roof) -> dict[str, Any]:
    """One matrix's time in a program over many; w [out, n] is what it stands for."""
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    count = max(2, -(-c.cold_bytes // nbytes))
    many = jax.tree.map(lambda leaf: jnp.stack([jnp.roll(leaf, k, axis=0) for k in range(count)]), packed)
    each = jax.jit(lambda x, many: lax.scan(lambda none, one: (none, multiply(x, one)), None, many)[1])
    time = seconds(each, x, many, rounds=c.rounds) / count
    return _row(x, w, nbytes, time, jax.jit(multiply)(x, packed)[:, :_CHECKED], top)


def _rival_timed(c: Contest, rival: Rival, x: Array, q: QTensor, top: Roof) -> dict[str, Any]:
    """One matrix's time among many, one call after another."""
    count = max(2, -(-c.cold_bytes // q.nbytes))
    many, nbytes = rival.packed(q, count, c.dtype)
    theirs = rival.inputs(x, c.dtype)
    time = seconds(lambda: [rival.product(theirs, one) for one in many], rounds=c.rounds) / count
    y = rival.array(rival.product(theirs, many[0]))[:, :_CHECKED]
    return _row(x.astype(DENSE[c.dtype]), dequantize(q), nbytes, time, y, top)


def _row(x: Array, w: Array, nbytes: int, time: float, y: Any, top: Roof) -> dict[str, Any]:
    """What is told of a product y of x with the first rows of w."""
    (out, n), m = w.shape, len(x)
    exact = np.asarray(x, np.float64) @ np.asarray(w[:_CHECKED], np.float64).T
    error = np.abs(np.asarray(y, np.float64) - exact).max()
    flops, moved = 2 * m * out * n, nbytes + x.nbytes + m * out * x.dtype.itemsize
    return {
        "out": out, "in": n, "rows": m, "seconds": time, "gb_per_second": moved / time / 1e9,
        "of_copy": moved / time / top.bytes, "error": float(error / np.abs(exact).max()),
        "flops": flops, "bytes": moved, "peak_flops": top.flops, "peak_bytes": top.bytes,
    }  # fmt: skip
