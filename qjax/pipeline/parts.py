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
    """`round_weight` on parts of its rows: one compiled program for all heights, and every core at work.

    The parts' height depends on the weight alone, so that it gives the same bytes on every number of cores.
    Accelerators take all rows at once.
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
    if jax.default_backend() != "cpu" or tied or any(r.whole for r in recipe.roundings):
        return whole
    grid: Any = format  # hashable, which its protocol cannot say
    seen = {kind: jnp.asarray(np.asarray(getattr(stats, kind))) for kind in stats.kinds}  # off other devices
    factor = None if stats.H is None else _factored(seen["H"], grid, recipe.roundings, recipe.damping)
    unseen = None if heldout is None else jnp.asarray(np.asarray(heldout))

    def parts(w: Array, fit: Fit | None = None) -> Rounded:
        rows = len(w)
        if rows % format.rows:
            return whole(w, fit)
        count = max(-(-rows // wanted), 2 if rows > _TALL // 2 else 1)  # two cores for what is no taller than a part
        height = min(wanted, -(-rows // count // _SHORT) * _SHORT)
        program = _program(
            height, n, grid, recipe.roundings, recipe.damping, stats.kinds, unseen is not None, fit is not None
        )

        def rounded(at: int) -> Rounded:
            def part(a: Array) -> Array:  # as many copies as threads, not one of the whole
                some = a[at : at + height]
                return jnp.pad(some, ((0, height - len(some)), *((0, 0),) * (a.ndim - 1)))

            made = program(part(w), seen, unseen, factor, jax.tree.map(part, fit))
            return jax.block_until_ready(made)  # or all parts would hold their temporaries at once

        with ThreadPoolExecutor(1 if n > _MOST_WIDE else workers()) as pool:
            made = list(pool.map(rounded, range(0, rows, height)))
        return concatenated(made, slice(rows))

    return parts


@lru_cache(maxsize=64)
def _program(
    height: int,
    n: int,
    format: Format,
    roundings: tuple[Rounding, ...],
    damping: float,
    kinds: tuple[str, ...],
    heldout: bool,
    fitted: bool,
) -> Callable[[Array, dict[str, Array], Array | None, Factor | None, Fit | None], Rounded]:
    """`round_weight` compiled for parts of one height, before the threads begin: each would compile it for itself."""

    def f32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = {"H": (n, n), "cross": (n, n), "h": (n,), "absmean": (n,), "absmax": (n,), "samples": (SAMPLES, n)}
    seen = {kind: f32(*shapes[kind]) for kind in kinds}

    def part(
        w: Array, seen: dict[str, Array], heldout: Array | None, factor: Factor | None, fit: Fit | None
    ) -> Rounded:
        return round_weight(w, format, roundings, Stats(**seen), damping, heldout, factor, fit)

    factor = jax.eval_shape(lambda H: factor_of(roundings, format, Stats(H=H), damping), seen.get("H"))
    fit = jax.eval_shape(format.encode, f32(height, n)) if fitted else None
    shapes_of = f32(height, n), seen, f32(n, n) if heldout else None, factor, fit
    return jax.jit(part, compiler_options=UNTUNED).lower(*shapes_of).compile()


@partial(untuned, static_argnames=("format", "roundings", "damping"))
def _factored(H: Array, format: Format, roundings: tuple[Rounding, ...], damping: float) -> Factor | None:
    return factor_of(roundings, format, Stats(H=H), damping)
