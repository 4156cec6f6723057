"""One weight through a recipe: rows, statistics and a grid in; packed blocks and a report line out."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.compiled import lapack_on_one_thread
from qjax.errors import UserError
from qjax.evaluate.sizes import relative_rmse
from qjax.formats import Format
from qjax.pipeline.believed import believed
from qjax.pipeline.encode import broken, broken_weights
from qjax.pipeline.few_tokens import saw_few
from qjax.pipeline.one_matrix import (
    Made,
    Shrinkage,
    aimed,
    changed,
    in_metric,
    output_curvatures,
    parted,
    rounded_rows,
    take_turns,
)
from qjax.pipeline.parts import in_parts
from qjax.pipeline.report import CalibrationReport
from qjax.pipeline.row_groups import folded, row_groups, unfolded
from qjax.recipes import Recipe
from qjax.reparam import Applied, restore, settle
from qjax.reparam.split import Sparse
from qjax.rounding import check_chain, nearest
from qjax.rounding.curvature import proxy, two_sided_loss
from qjax.rounding.protocol import rounded_of
from qjax.rounding.shrinkage import Split
from qjax.rounding.two_sided import turn_size, turns_of
from qjax.stats import Stats, missing
from qjax.tensor import QTensor
from qjax.typing import Array


@lapack_on_one_thread()
def round_leaf(
    name: str, leaf: Any, axis: int, format: Format, recipe: Recipe, stats: Stats, heldout: Stats | None = None,
    shared: dict[Any, Split] | None = None,
) -> tuple[QTensor, CalibrationReport]:  # fmt: skip
    """Round one matrix, or a stack of them with a stack of statistics.

    Args:
      name: for messages.
      leaf: floats [*b, ...]; its last two axes are a matrix, contracted along `axis`.
      axis: -1 or -2.
      format: the grid.
      recipe: its reparametrizations and roundings; its own format is not looked at.
      stats: of the leaf's input, stacked like the leaf, or one for the whole stack.
      heldout: statistics of other tokens, to report the loss in, or to shrink the others.
      shared: what the weights of one input make of it together; the same dict for all of them.

    Raises:
      UserError: NaN or Inf in the weight, a missing statistic or one of another size, an H that no damping makes
        definite.
    """
    clock = time.perf_counter()
    rows = jnp.asarray(leaf, jnp.float32)
    rows = rows if axis == -1 else jnp.moveaxis(rows, axis, -1)  # which copies
    bad = broken(rows)
    if bad:
        raise broken_weights(name, bad)
    n = rows.shape[-1]
    for kind in (*stats.kinds,):
        if kind != "samples" and getattr(stats, kind).shape[-1] != n:
            size = getattr(stats, kind).shape[-1]
            raise UserError(f"{name}: the statistic {kind!r} is of {size} inputs, the weight has {n}")
    check_chain(recipe.roundings, format, stats, name)
    k, stats, heldout, why_one = row_groups(name, rows, format, recipe, stats, heldout)
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
    needed |= {"G": _curvature(name, stats.G, rows)} if recipe.two_sided and stats.G is not None else {}
    stats = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), Stats(**needed, count=_count(stats, k)))
    try:
        parts = folded(rows, k)
        made, applied, told = _stacked(parts, format, recipe, stats, heldout, {} if shared is None else shared)
        made = unfolded(made, rows.ndim - 2, k)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    damping = float(np.max(np.asarray(made.damping)))
    if not np.isfinite(np.asarray(made.damping)).all():
        raise UserError(
            f"{name}: H = E[x x^T] is not positive semi-definite, whatever is added to its diagonal; the statistics "
            "are broken: collect them again in float32"
        )
    q = QTensor(format.pack(made.scales, made.codes), format, axis, applied, jnp.asarray(leaf).dtype)
    if not np.isfinite(relative_rmse(dataclasses.replace(q, axis=-1), rows)):
        raise UserError(f"{name}: its values are too large for {format.name}")
    counts = np.asarray(stats.count)[..., 0] if k else np.asarray(stats.count)
    shrinkage = _told(told)
    if "shrinkage" in shrinkage and heldout is not None:  # all tokens made it
        counts = np.asarray(counts + np.asarray(_count(heldout)))
    count = int(np.min(counts))
    notes = [few] if recipe.requires and (few := saw_few(counts, n)) else []
    notes += ["no window was held out, so nothing was shrunk"] * (recipe.shrink and "shrinkage" not in shrinkage)
    notes += [f"rows stand alone: {why}"] if recipe.two_sided and (why := _alone(format, stats)) else []
    notes += [why_one] if why_one else []
    note = "; ".join(notes)
    losses = (_mean(made.first_loss), _mean(made.loss), _mean(made.first_heldout_loss), _mean(made.heldout_loss))
    by_matrix = tuple(counts.reshape(-1).astype(int).tolist()) if counts.ndim else ()
    seconds = time.perf_counter() - clock
    return q, CalibrationReport(*losses, damping, count, seconds, note, by_matrix=by_matrix, **shrinkage)


def _told(found: Shrinkage | None) -> dict[str, Any]:
    """Means over a stack, for the report; what is NaN was not done."""
    if found is None:
        return {}
    a, t, guarded, output = (np.asarray(v) for v in dataclasses.astuple(found))
    told: dict[str, Any] = {} if np.isnan(output).all() else {"output_shrinkage": float(np.nanmean(output))}
    if not np.isnan(a).all():
        told |= {"shrinkage": float(a.mean()), "cross_share": float(t.mean()), "guarded": bool(guarded.any())}
    return told


def _alone(format: Format, stats: Stats) -> str:
    """Why a two-sided recipe cannot round a weight's rows for each other, or nothing."""
    if stats.G is None:
        return "G of the weight's output is not known"
    return "" if take_turns(format, stats.G) else f"{format.name} holds rows together"


def _count(stats: Stats, k: int = 0) -> Any:
    """Tokens; of k groups of rows as many times."""
    count = jnp.float32(0.0) if stats.count is None else stats.count
    return jnp.broadcast_to(count, (k,)) if k and count.ndim == 0 else count


def _curvature(name: str, G: Any, rows: Array) -> Any:
    """G of the weight's output, looked at."""
    *stack, k, m, also = G.shape
    if tuple(stack) not in ((), rows.shape[:-2]) or m != also or k * m != rows.shape[-2]:
        raise UserError(f"{name}: G has the shape {G.shape}, and the weight has {rows.shape[-2]} outputs")
    if not bool(jnp.all(jnp.isfinite(jnp.asarray(G)))):
        raise UserError(f"{name}: G of its output has values that are NaN or infinite")
    return G


def plain(recipe: Recipe) -> Recipe:
    """What is left of a recipe for a weight without statistics: nearest, unweighted."""
    return Recipe((nearest(),), recipe.format, name="rtn")


def _stacked(
    rows: Array, format: Format, recipe: Recipe, stats: Stats, heldout: Stats | None, shared: dict[Any, Split]
) -> Made:
    """A matrix, or a stack of them one after the other."""
    if rows.ndim == 2:
        return _one(rows, format, recipe, stats, heldout, shared)
    lead = rows.shape[:-2]
    own = {"H": 2, "cross": 2, "samples": 2, "h": 1, "absmean": 1, "absmax": 1, "count": 0, "G": 3}

    def pick(a: Array | None, own: int, at: tuple[int, ...]) -> Array | None:
        """The part of a statistic for one matrix; a statistic without the stack's last axes is for all."""
        return a if a is None or a.ndim == own else a[at[: a.ndim - own]]

    made = []

    def at_one(stats: Stats, at: tuple[int, ...]) -> Stats:
        return Stats(**{k: pick(getattr(stats, k), axes, at) for k, axes in own.items()})

    for at in np.ndindex(*lead):
        held = None if heldout is None else at_one(heldout, at)
        made.append(_one(rows[at], format, recipe, at_one(stats, at), held, {}))
    try:
        return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*lead, *parts[0].shape), *_even(made))
    except ValueError:
        raise UserError(
            "the matrices of a stack split off different numbers of columns; say columns(share=...), not threshold="
        ) from None


def _even(made: list[Made]) -> list[Made]:
    """The same, with sparse parts padded to one length: values behind the last row are added nowhere."""

    def pad(one: Applied, others: tuple[Applied, ...]) -> Applied:
        if not isinstance(one, Sparse):
            return one
        most = max(o.values.shape[0] for o in others if isinstance(o, Sparse))
        more = (0, most - one.values.shape[0])
        return dataclasses.replace(one, at=jnp.pad(one.at, more), values=jnp.pad(one.values, more))

    columns = list(zip(*(applied for _, applied, _ in made), strict=True))
    return [(r, tuple(map(pad, applied, columns)), told) for r, applied, told in made]


LOOKED_UP = "is looked up: without the recipe's changes of variables"


def of_embedding(recipe: Recipe) -> Recipe:
    """For a weight that is looked up: as it is, for there is no input to change."""
    return dataclasses.replace(recipe, reparams=())


def _one(w: Array, format: Format, recipe: Recipe, stats: Stats, seen: Stats | None, shared: dict[Any, Split]) -> Made:
    """One matrix, behind the recipe's reparametrizations; losses are those of the weight as it was."""
    if recipe.shrink and stats.H is not None and seen is not None:
        return believed(w, format, recipe, stats, seen, shared)
    heldout = None if seen is None else seen.H
    if recipe.two_sided and stats.G is not None and stats.H is not None:
        return _in_turns(w, format, recipe, stats, seen)
    if not recipe.reparams:
        return *parted(in_parts(w, format, recipe, stats, heldout), format, ()), None
    site, applied, found = changed(w, format, recipe, stats)
    made = in_parts(site.w, format, recipe, site.stats, None)
    w_hat = rounded_of(made, format)
    applied = settle(applied, found, w_hat)
    if stats.H is None:
        return made, applied, None  # no rounding makes outliers without H
    sums: dict[str, Any] = {"energy": jnp.sum(proxy(w, stats.H))}
    if stats.cross is None:  # with a cross term the target is another one, known behind the chain only
        e = w - restore(applied, w_hat)
        sums["error"] = jnp.sum(proxy(e, stats.H))
        if heldout is not None:
            heldout = jnp.asarray(heldout)
            sums |= {"heldout_energy": jnp.sum(proxy(w, heldout)), "heldout_error": jnp.sum(proxy(e, heldout))}
    return *parted(dataclasses.replace(made, **sums), format, applied), None


def _in_turns(w: Array, format: Format, recipe: Recipe, stats: Stats, seen: Stats | None) -> Made:
    """One matrix whose rows make up for each other, H and G believed whole; losses are those behind the chain, but of
    held-out tokens those of the weight as it was."""
    site, applied, found = changed(w, format, recipe, dataclasses.replace(stats, G=None))
    G = output_curvatures(recipe, format, applied, w.shape, stats, None)
    if G is None:
        return _one(w, format, recipe, dataclasses.replace(stats, G=None), seen, {})
    m = G.both.shape[-1]
    target, rest = aimed(site.w, format, recipe, site.stats)
    tied = format.rows
    turns = turns_of(G.both, 0.0, turn_size(m, recipe.two_sided, tied), recipe.damping, tied)
    made = rounded_rows(target, format, rest, dataclasses.replace(site.stats, cross=None), turns)
    w_hat = rounded_of(made, format)
    made, nan = in_metric(made, site.w, target - w_hat, None, site.stats.H, G.both), jnp.float32(jnp.nan)
    applied = settle(applied, found, w_hat)
    if seen is not None and seen.H is not None and stats.cross is None:
        ends = (two_sided_loss(v, jnp.asarray(seen.H), seen.G) for v in (w, w - restore(applied, w_hat)))
        made = dataclasses.replace(made, **dict(zip(("heldout_energy", "heldout_error"), ends, strict=True)))
    return *parted(made, format, applied), Shrinkage(nan, nan, jnp.asarray(False), jnp.float32(0.0))


def _mean(loss: Array) -> float | None:
    value = float(np.mean(np.asarray(loss)))
    return value if np.isfinite(value) else None
