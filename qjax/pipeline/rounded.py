"""One weight through a recipe: rows, statistics and a grid in; packed blocks and a report line out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.moments import SAMPLES
from qjax.compiled import UNTUNED, untuned
from qjax.errors import UserError
from qjax.formats import Format
from qjax.pipeline.encode import broken_weights, workers
from qjax.pipeline.report import CalibrationReport
from qjax.recipes import Recipe
from qjax.reparam import Applied, Site, reparametrize, restore, settle
from qjax.reparam.inputs import RoundedInput
from qjax.reparam.split import Sparse, sparse_of
from qjax.rounding import Rounded, Rounding, check_chain, nearest, round_weight
from qjax.rounding.curvature import Factor, proxy
from qjax.rounding.protocol import factor_of, requires
from qjax.stats import Stats, missing
from qjax.tensor import QTensor, dequantize
from qjax.typing import Array

_SHORT, _TALL = 256, 2048  # rows rounded at a time; few where n is small and a part is soon done
_WIDE, _MOST_WIDE = 2048, 8192  # columns from which parts are tall; beyond which they take turns, for memory's sake


def round_leaf(
    name: str, leaf: Any, axis: int, format: Format, recipe: Recipe, stats: Stats, heldout: Stats | None = None
) -> tuple[QTensor, CalibrationReport]:
    """Round one matrix, or a stack of them with a stack of statistics.

    Args:
      name: for messages.
      leaf: floats [*b, ...]; its last two axes are a matrix, contracted along `axis`.
      axis: -1 or -2.
      format: the grid.
      recipe: its reparametrizations and roundings; its own format is not looked at.
      stats: of the leaf's input, stacked like the leaf, or one for the whole stack.
      heldout: statistics of other tokens, to report the loss in.

    Raises:
      UserError: NaN or Inf in the weight, a missing statistic or one of another size, an H that no damping makes
        definite.
    """
    clock = time.perf_counter()
    rows = jnp.moveaxis(jnp.asarray(leaf, jnp.float32), axis, -1)
    bad = int(jnp.sum(~jnp.isfinite(rows)))
    if bad:
        raise broken_weights(name, bad)
    n = rows.shape[-1]
    for kind in (*stats.kinds,):
        if kind != "samples" and getattr(stats, kind).shape[-1] != n:
            size = getattr(stats, kind).shape[-1]
            raise UserError(f"{name}: the statistic {kind!r} is of {size} inputs, the weight has {n}")
    check_chain(recipe.roundings, format, stats, name)
    for kind in sorted(recipe.requires):
        found = stats.importance if kind == "h" else getattr(stats, kind)
        if found is None:
            raise UserError(f"{name}: {missing(kind)}")
        low = 0.0 if kind in ("h", "absmean", "absmax") else -jnp.inf
        bad = int(jnp.sum(~(jnp.isfinite(found := jnp.asarray(found)) & (found >= low))))
        if bad:
            what = "NaN or infinite" if low else "NaN, infinite or negative"
            raise UserError(f"{name}: the statistic {kind!r} has {bad} values that are {what}")
    needed: dict[str, Any] = {k: getattr(stats, k) for k in recipe.requires - {"h"}}
    needed |= {"h": stats.importance} if "h" in recipe.requires else {}
    needed |= {} if stats.H is None else {"H": stats.H}  # to report the loss in
    stats = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), Stats(**needed, count=_count(stats)))
    made, applied = _stacked(rows, format, recipe, stats, None if heldout is None else heldout.H)
    damping = float(np.max(np.asarray(made.damping)))
    if not np.isfinite(np.asarray(made.damping)).all():
        raise UserError(
            f"{name}: H = E[x x^T] is not positive semi-definite, whatever is added to its diagonal; the statistics "
            "are broken: collect them again in float32"
        )
    q = QTensor(format.pack(made.scales, made.codes), format, axis, applied, jnp.asarray(leaf).dtype)
    if not np.isfinite(relative_error(rows, dataclasses.replace(q, axis=-1))):
        raise UserError(f"{name}: its values are too large for {format.name}")
    count = int(np.min(np.asarray(stats.count)))
    note = f"saw {count} tokens, fewer than its {n} inputs" if recipe.requires and 0 < count < n else ""
    losses = (_mean(made.first_loss), _mean(made.loss), _mean(made.first_heldout_loss), _mean(made.heldout_loss))
    return q, CalibrationReport(*losses, damping, count, time.perf_counter() - clock, note)


def _count(stats: Stats) -> Any:
    return jnp.float32(0.0) if stats.count is None else stats.count


def plain(recipe: Recipe) -> Recipe:
    """What is left of a recipe for a weight without statistics: nearest, unweighted."""
    return Recipe((nearest(),), recipe.format, name="rtn")


def relative_error(leaf: Any, q: QTensor) -> float:
    """sqrt(sum (w - w_hat)^2 / sum w^2)."""
    square, error = (float(np.asarray(v)) for v in _squares(jnp.asarray(leaf, jnp.float32), dequantize(q)))
    return (error / square) ** 0.5 if square else 0.0


def _stacked(
    rows: Array, format: Format, recipe: Recipe, stats: Stats, heldout: Array | None
) -> tuple[Rounded, tuple[Applied, ...]]:
    """A matrix, or a stack of them one after the other."""
    if rows.ndim == 2:
        return _one(rows, format, recipe, stats, heldout)
    lead = rows.shape[:-2]
    own = {"H": 2, "cross": 2, "samples": 2, "h": 1, "absmean": 1, "absmax": 1, "count": 0}

    def pick(a: Array | None, own: int, at: tuple[int, ...]) -> Array | None:
        """The part of a statistic for one matrix; a statistic without the stack's last axes is for all."""
        return a if a is None or a.ndim == own else a[at[: a.ndim - own]]

    made = []
    for at in np.ndindex(*lead):
        one = Stats(**{k: pick(getattr(stats, k), axes, at) for k, axes in own.items()})
        made.append(_one(rows[at], format, recipe, one, pick(heldout, 2, at)))
    try:
        return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*lead, *parts[0].shape), *_even(made))
    except ValueError:
        raise UserError(
            "the matrices of a stack split off different numbers of columns; say columns(share=...), not threshold="
        ) from None


def _even(made: list[tuple[Rounded, tuple[Applied, ...]]]) -> list[tuple[Rounded, tuple[Applied, ...]]]:
    """The same, with sparse parts padded to one length: values behind the last row are added nowhere."""

    def pad(one: Applied, others: tuple[Applied, ...]) -> Applied:
        if not isinstance(one, Sparse):
            return one
        most = max(o.values.shape[0] for o in others if isinstance(o, Sparse))
        more = (0, most - one.values.shape[0])
        return dataclasses.replace(one, at=jnp.pad(one.at, more), values=jnp.pad(one.values, more))

    columns = list(zip(*(applied for _, applied in made), strict=True))
    return [(r, tuple(map(pad, applied, columns))) for r, applied in made]


LOOKED_UP = "is looked up: without the recipe's changes of variables"


def of_embedding(recipe: Recipe) -> Recipe:
    """For a weight that is looked up: as it is, for there is no input to change."""
    return dataclasses.replace(recipe, reparams=())


def _one(
    w: Array, format: Format, recipe: Recipe, stats: Stats, heldout: Array | None
) -> tuple[Rounded, tuple[Applied, ...]]:
    """One matrix, behind the recipe's reparametrizations; losses are those of the weight as it was."""
    if not recipe.reparams:
        made = _in_parts(w, format, recipe, stats, heldout)
        return (made, ()) if made.outliers is None else _with_outliers(made, format, ())
    roundings = recipe.roundings

    def loss(w: Array, stats: Stats) -> Array:
        return round_weight(w, format, roundings, stats, recipe.damping).error

    kept = requires(roundings) | ({"H"} if stats.H is not None else frozenset())
    site, applied, found = reparametrize(recipe.reparams, Site(w, stats, format, loss), kept)
    made = _in_parts(site.w, format, recipe, site.stats, None)
    w_hat = format.decode(made.scales, made.codes)
    if made.outliers is not None:
        w_hat = jnp.where(*made.outliers, w_hat)
    applied = settle(applied, found, w_hat)
    if stats.H is None:
        return made, applied  # no rounding makes outliers without H
    sums: dict[str, Any] = {"energy": jnp.sum(proxy(w, stats.H))}
    if stats.cross is None:  # with a cross term the target is another one, known behind the chain only
        e = w - restore(applied, w_hat)
        sums["error"] = jnp.sum(proxy(e, stats.H))
        if heldout is not None:
            heldout = jnp.asarray(heldout)
            sums |= {"heldout_energy": jnp.sum(proxy(w, heldout)), "heldout_error": jnp.sum(proxy(e, heldout))}
    made = dataclasses.replace(made, **sums)
    return (made, applied) if made.outliers is None else _with_outliers(made, format, applied)


def _with_outliers(made: Rounded, format: Format, applied: tuple[Applied, ...]) -> tuple[Rounded, tuple[Applied, ...]]:
    """Outliers of the rounding as the innermost split; rounded inputs stay last."""
    assert made.outliers is not None
    mask, values = made.outliers
    part = sparse_of(values, np.asarray(mask), format.decode(made.scales, made.codes))
    last = applied[-1:] if applied and isinstance(applied[-1], RoundedInput) else ()
    return dataclasses.replace(made, outliers=None), (*applied[: len(applied) - len(last)], part, *last)


def _in_parts(w: Array, format: Format, recipe: Recipe, stats: Stats, heldout: Array | None) -> Rounded:
    """`round_weight` on parts of its rows: one compiled program for all heights, and every core at work.

    The parts' height depends on n alone, so the same weight gives the same bytes on every number of cores. Accelerators
    take all rows at once.
    """
    rows, n = w.shape
    height = _SHORT if n < _WIDE else _TALL
    tied = format.rows == 0 or height % format.rows or rows % format.rows
    whole = tied or any(r.whole for r in recipe.roundings)
    if jax.default_backend() != "cpu" or whole:
        return round_weight(w, format, recipe.roundings, stats, recipe.damping, heldout)
    grid: Any = format  # hashable, which its protocol cannot say
    seen = {kind: jnp.asarray(np.asarray(getattr(stats, kind))) for kind in stats.kinds}  # off other devices
    factor = None if stats.H is None else _factored(seen["H"], grid, recipe.roundings, recipe.damping)
    program = _program(height, n, grid, recipe.roundings, recipe.damping, stats.kinds, heldout is not None)
    heldout = None if heldout is None else jnp.asarray(np.asarray(heldout))
    padded = jnp.pad(w, ((0, -rows % height), (0, 0)))
    parts = [padded[at : at + height] for at in range(0, len(padded), height)]
    with ThreadPoolExecutor(1 if n > _MOST_WIDE else workers()) as pool:
        made = list(pool.map(lambda part: program(part, seen, heldout, factor), parts))
    joined = {f.name: [getattr(m, f.name) for m in made] for f in dataclasses.fields(Rounded) if f.name != "outliers"}
    scales = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:rows], *joined.pop("scales"))
    codes = jnp.concatenate(joined.pop("codes"))[:rows]
    damping = jnp.max(jnp.stack(joined.pop("damping")))
    return Rounded(scales, codes, damping, **{name: sum(parts[1:], parts[0]) for name, parts in joined.items()})


@lru_cache(maxsize=64)
def _program(
    height: int,
    n: int,
    format: Format,
    roundings: tuple[Rounding, ...],
    damping: float,
    kinds: tuple[str, ...],
    heldout: bool,
) -> Callable[[Array, dict[str, Array], Array | None, Factor | None], Rounded]:
    """`round_weight` compiled for parts of one height, before the threads begin: each would compile it for itself."""

    def f32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    shapes = {"H": (n, n), "cross": (n, n), "h": (n,), "absmean": (n,), "absmax": (n,), "samples": (SAMPLES, n)}
    seen = {kind: f32(*shapes[kind]) for kind in kinds}

    def part(w: Array, seen: dict[str, Array], heldout: Array | None, factor: Factor | None) -> Rounded:
        return round_weight(w, format, roundings, Stats(**seen), damping, heldout, factor)

    factor = jax.eval_shape(lambda H: factor_of(roundings, format, Stats(H=H), damping), seen.get("H"))
    shapes_of = f32(height, n), seen, f32(n, n) if heldout else None, factor
    return jax.jit(part, compiler_options=UNTUNED).lower(*shapes_of).compile()


@partial(untuned, static_argnames=("format", "roundings", "damping"))
def _factored(H: Array, format: Format, roundings: tuple[Rounding, ...], damping: float) -> Factor | None:
    return factor_of(roundings, format, Stats(H=H), damping)


@jax.jit
def _squares(w: Array, w_hat: Array) -> tuple[Array, Array]:
    top = jnp.maximum(jnp.max(jnp.abs(w)), 1e-30)
    return jnp.sum(jnp.square(w / top)), jnp.sum(jnp.square((w - w_hat) / top))


def _mean(loss: Array) -> float | None:
    value = float(np.mean(np.asarray(loss)))
    return value if np.isfinite(value) else None
