"""A matrix through a chain of roundings in parts of its rows: one program for all heights, every core at work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.moments import SAMPLES
from qjax.compiled import UNTUNED, untuned, workers
from qjax.formats import Format
from qjax.formats.protocol import Scales
from qjax.models.devices import at_once, in_order
from qjax.recipes import Recipe
from qjax.rounding import Rounded, Rounding, round_weight
from qjax.rounding.curvature import Factor
from qjax.rounding.protocol import concatenated, factor_of
from qjax.stats import Stats
from qjax.typing import Array

_SHORT, _TALL = 256, 2048  # rows rounded at a time; few where n is small and a part is soon done
_WIDE, _MOST_WIDE = 2048, 8192  # columns from which parts are tall; beyond which they take turns, for memory's sake


Fit = tuple[Scales, Array]


def in_parts(
    w: Array, format: Format, recipe: Recipe, stats: Stats, heldout: Array | None, fit: Fit | None = None
) -> Rounded:
    """`round_weight` on parts of its rows: one compiled program for all heights, and every core and device at work.

    The parts' height depends on the weight alone, so that it gives the same bytes on every number of cores, devices and
    processes. Accelerators are slowed down by parts: there each takes as many of the rows as any other, and one all.
    With several processes all of them call this with the same arguments.
    """
    return by_parts(w.shape[1], format, recipe, stats, heldout)(w, fit)


def by_parts(
    n: int, format: Format, recipe: Recipe, stats: Stats, heldout: Array | None = None, height: int = 0
) -> Callable[..., Rounded]:
    """(w, fit) -> `in_parts` of rows of n, with what is the same for all rows made once.

    Args:
      height: rows of a part at most; 0: as n asks for.
    """
    wanted = height or (_SHORT if n < _WIDE else _TALL)

    def whole(w: Array, fit: Fit | None = None) -> Rounded:
        return round_weight(w, format, recipe.roundings, stats, recipe.damping, heldout, fit=fit)

    tied = format.rows == 0 or wanted % format.rows or _SHORT % format.rows
    if tied or any(r.whole for r in recipe.roundings) or (jax.default_backend() != "cpu" and at_once() == 1):
        return whole
    grid: Any = format  # hashable, which its protocol cannot say
    seen = {kind: jnp.asarray(np.asarray(getattr(stats, kind))) for kind in stats.kinds}  # off other devices
    factor = None if stats.H is None else _factored(seen["H"], grid, recipe.roundings, recipe.damping)
    unseen = None if heldout is None else jnp.asarray(np.asarray(heldout))

    def parts(w: Array, fit: Fit | None = None) -> Rounded:
        rows = len(w)
        if rows % format.rows:
            return whole(w, fit)
        height = _height(rows, wanted)
        kind = height, n, grid, recipe.roundings, recipe.damping, stats.kinds, unseen is not None, fit is not None
        starts, processes = range(0, rows, height), jax.process_count()
        every = [*starts, *[rows] * (-len(starts) % processes)]  # behind the last are zeros: as many for each process
        own = every[jax.process_index() :: processes]
        devices = jax.local_devices()[: len(own)]
        everywhere = [jax.device_put((seen, unseen, factor), d) for d in devices]

        def part(a: Array, at: int) -> Array:  # as many copies as threads, not one of the whole
            some = a[at : at + height]
            return jnp.pad(some, ((0, height - len(some)), *((0, 0),) * (a.ndim - 1)))

        def rounded(k: int, at: int) -> Rounded:
            here = devices[k % len(devices)]
            some = jax.device_put(jax.tree.map(lambda a: part(a, at), (w, fit)), here)
            made = _program(here, *kind)(*everywhere[k % len(devices)], *some)
            # waited for: or all parts would hold their temporaries at once
            return jax.block_until_ready(jax.device_put(made, devices[0]))

        _program(devices[0], *kind)  # traced and compiled before the threads begin: each would for itself
        with ThreadPoolExecutor(max(len(devices), 1 if n > _MOST_WIDE else workers())) as pool:
            list(pool.map(lambda d: _program(d, *kind), devices))
            made = list(pool.map(rounded, range(len(own)), own))
        return concatenated(in_order(made)[: len(starts)], slice(rows))

    return parts


def _height(rows: int, wanted: int) -> int:
    """Rows of a part."""
    if jax.default_backend() != "cpu":
        return -(-rows // at_once() // _SHORT) * _SHORT
    count = max(-(-rows // wanted), 2 if rows > _TALL // 2 else 1)  # two cores for what is no taller than a part
    return min(wanted, -(-rows // count // _SHORT) * _SHORT)


@lru_cache(maxsize=64)
def _program(
    device: jax.Device,
    height: int,
    n: int,
    format: Format,
    roundings: tuple[Rounding, ...],
    damping: float,
    kinds: tuple[str, ...],
    heldout: bool,
    fitted: bool,
) -> Callable[[dict[str, Array], Array | None, Factor | None, Array, Fit | None], Rounded]:
    """`round_weight` compiled for parts of one height, on a device."""

    def f32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = {"H": (n, n), "cross": (n, n), "h": (n,), "absmean": (n,), "absmax": (n,), "samples": (SAMPLES, n)}
    seen = {kind: f32(*shapes[kind]) for kind in kinds}
    factor = jax.eval_shape(lambda H: factor_of(roundings, format, Stats(H=H), damping), seen.get("H"))
    fit = jax.eval_shape(format.encode, f32(height, n)) if fitted else None
    here = jax.sharding.SingleDeviceSharding(device)
    args = seen, f32(n, n) if heldout else None, factor, f32(height, n), fit
    args = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), args)
    grid: Any = format  # hashable, which its protocol cannot say
    return _part(grid, roundings, damping).lower(*args).compile()


@lru_cache(maxsize=64)
def _part(format: Format, roundings: tuple[Rounding, ...], damping: float) -> Any:
    """The program before it is compiled, traced once for all devices."""

    def part(seen: Any, heldout: Array | None, factor: Factor | None, w: Array, fit: Fit | None) -> Rounded:
        return round_weight(w, format, roundings, Stats(**seen), damping, heldout, factor, fit)

    return jax.jit(part, compiler_options=UNTUNED)


@partial(untuned, static_argnames=("format", "roundings", "damping"))
def _factored(H: Array, format: Format, roundings: tuple[Rounding, ...], damping: float) -> Factor | None:
    return factor_of(roundings, format, Stats(H=H), damping)
