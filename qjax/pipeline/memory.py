"""Quantize a params tree in memory.

qparams[path] = recipe(params[path], plan(path), stats[path])       kept leaves pass through

Statistics come from outside, of the float model as `observe` gives them: any model will do. A decoder whose statistics
should follow what is rounded already goes through `quantize_model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.calibrate import check_stats
from qjax.chain import Chain
from qjax.compiled import workers
from qjax.errors import UserError
from qjax.evaluate.sizes import relative_rmse
from qjax.formats import BlockFormat, Format
from qjax.lifting import report, roles
from qjax.pipeline.encode import check_finite, compile_ahead, encode_tensor
from qjax.pipeline.report import Report, TensorReport
from qjax.pipeline.rounded import LOOKED_UP, of_embedding, round_leaf
from qjax.plan import Assignment, Plan, Weight
from qjax.plan.named import as_plan
from qjax.recipes import Recipe
from qjax.recipes import recipe as get_recipe
from qjax.stats import Stats, axes_seen, missing
from qjax.tensor import QTensor, dequantize, is_qtensor, merged, quantize


def quantize_params(
    params: Any,
    plan: str | Format | Plan,
    stats: Mapping[str, Stats | Array] | None = None,
    key: Array | None = None,
    *,
    recipe: str | Recipe | Chain = "rtn",
    axes: Mapping[str, Any] | None = None,
    apply: Callable[..., Any] | None = None,
    inputs: tuple[Any, ...] = (),
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[Any, Report]:
    """Quantize the weights of a params tree as a plan says.

    Args:
      params: a tree of floats; integers and keys of random numbers in it pass through. A leaf named `embedding` has
        its blocks along its last axis; every other matrix is a flax kernel (in, out), or a stack of them, with its
        blocks along `in`; `axes` says otherwise.
      plan: patterns over the leaves' paths ("layers_0/attn/q/kernel"), see `qjax.plan`; or a format's name, for all.
      stats: {path: Stats}, what `qjax.observe` gives; or {path: f32[in]}, the importance of each input of a weight
        (mean squared activation), of a stack f32[*stack, in]. With a recipe that needs none,
        weights that it does not name are rounded without.
      key: for formats that draw random numbers; today's need none.
      recipe: how to round where the plan's rule does not say; a name or a Recipe.
      axes: {path: contracted axis, -1 or -2}, as `contracted_axes` finds them for any function. Without it the axes
        are those that `apply` shows, then those of the statistics, then what the leaves' names say.
      apply, inputs: the function of (params, *inputs) that the weights are for, and examples or shapes of its inputs.
      progress: called as (leaf, bytes of the tree done, of all) after each leaf.

    Returns: the same tree with QTensors in place of the quantized weights, and a Report of every leaf.

    Raises:
      UserError: what `Plan.assign` raises; NaN or Inf in a weight, a kept one too, or in its importance; importance
        of another length or of no weight; a statistic that the recipe needs and the weight lacks; what `round_leaf`
        raises. Each names the leaf.
    """
    del key
    if hasattr(params, "params") and hasattr(params, "config"):
        raise UserError("quantize_params takes a tree of weights: give model.params, or the Model to quantize_model")
    plan, recipe, stats = as_plan(plan), get_recipe(recipe), stats or {}
    seen = {} if apply is None else contracted_axes(apply, params, *inputs, plan=plan)
    unsaid = {path: s for path, s in stats.items() if path not in (axes or {}) and not plan.keeps(path)}
    along: dict[str, Any] = axes_seen(unsaid) | seen | dict(axes or {})
    leaves, tree = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    weights = [named_weight(name, leaf, along) for name, (_, leaf) in zip(names, leaves, strict=True)]
    for path, axis in along.items():
        if not all(isinstance(a, int) and a < 0 for a in (axis if isinstance(axis, tuple) else (axis,))):
            raise UserError(
                f"axes: {path!r} has {axis!r}; say -1 for rows (out, in), -2 for a flax kernel (in, out), or adjacent "
                "axes to merge, (-3, -2)"
            )
    for what, named in (("stats", stats), ("axes", along)):
        for path in named:
            if path not in {w.path for w in weights}:
                raise UserError(f"{what}: no weight is called {path!r}; they are called like {weights[0].path!r}")
    out, lines, done, total = [], [], 0, sum(leaf.nbytes for _, leaf in leaves)
    of_floats = iter(plan.assign(w for w, (_, leaf) in zip(weights, leaves, strict=True) if _holds_floats(leaf)))
    assigned = [
        next(of_floats) if _holds_floats(leaf) else Assignment(w, None, "no floats")
        for w, (_, leaf) in zip(weights, leaves, strict=True)
    ]
    with ThreadPoolExecutor(workers()) as pool:
        compile_ahead(
            pool,
            dict.fromkeys(
                (a.format, np.dtype(leaf.dtype), a.weight.path in stats)
                for (_, leaf), a in zip(leaves, assigned, strict=True)
                if isinstance(a.format, BlockFormat) and not is_qtensor(leaf) and (a.recipe or recipe).is_plain
            ),
        )
        for (_, leaf), assignment in zip(leaves, assigned, strict=True):
            path = assignment.weight.path
            axis = along.get(path, contracted_axis(path, leaf.ndim))
            seen_by = stats.get(path)
            if assignment.format is not None and isinstance(seen_by, Stats):
                seen_by = seen_by.along(axis, path)
            whole, axis, split = merged(leaf.shape, axis)
            one = leaf.reshape(whole) if split and not is_qtensor(leaf) else leaf
            q, line = _quantize_leaf(pool, one, axis, assignment, assignment.recipe or recipe, seen_by)
            q = leaf if q is one else dataclasses.replace(q, split=split) if is_qtensor(q) else q
            out.append(q)
            lines.append(line)
            done += leaf.nbytes
            progress(path, done, total)
    notes = [plan.note] if plan.note else []
    notes += [] if apply is None else _not_matrices(apply, params, inputs, {x.name for x in lines if x.kept is None})
    return jax.tree_util.tree_unflatten(tree, out), Report(tuple(lines), tuple(notes))


def _not_matrices(apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...], rounded: set[str]) -> list[str]:
    """A line for each rounded leaf that the function neither contracts nor looks up."""
    return [
        f"{r.path}: was rounded, and is no matrix to the function: {r.role} ({', '.join(r.primitives) or 'not read'})"
        for r in roles(apply, params, *inputs).rows
        if r.path in rounded and not set(r.role.split(", ")) <= {"matrix", "table", "kernel"}
    ]


def contracted_axis(path: str, ndim: int) -> int:
    """The axis along which a weight is contracted, by its name: -1 for embeddings (vocab, dim), -2 for kernels."""
    return -1 if ndim < 2 or _name(path) == "embedding" else -2


def _name(path: str) -> str:
    """A leaf's own name; the states of flax nnx have the value of each variable behind it."""
    return path.removesuffix("/value").rsplit("/", 1)[-1]


def _holds_floats(leaf: Any) -> bool:
    return is_qtensor(leaf) or jnp.issubdtype(leaf.dtype, jnp.floating)


def contracted_axes(
    apply_fn: Callable[..., Any], params: Any, *args: Any, plan: str | Format | Plan | None = None
) -> dict[str, Any]:
    """{path: axis} of every weight that a function contracts or looks up, for `quantize_params`; adjacent axes
    that are contracted together, as (heads, head_dim), are a tuple.

    Args:
      apply_fn: function of (params, *args), which is traced.
      plan: weights that it keeps may be contracted in any way, and are left out.

    Raises:
      UserError: a weight that is contracted along two different axes, or along several that are not adjacent.
    """
    plan = None if plan is None else as_plan(plan)
    found: dict[str, Any] = {}
    for use in report(apply_fn, params, *args):
        if use.axis is None or (plan is not None and plan.keeps(use.path)):
            continue
        axis = use.axis if len(use.axes) == 1 else use.axes
        apart = use.axes != tuple(range(use.axes[0], use.axes[-1] + 1))
        if apart or found.get(use.path, axis) != axis:
            raise UserError(
                f"{use.path}: contracted along {use.axes} by {use.primitive}, earlier {found.get(use.path)}; blocks "
                "run along one axis or adjacent ones: keep it in the plan, and let contracted_axes know by plan=..."
            )
        found[use.path] = axis
    return found


def named_weight(path: str, leaf: Any, axes: Mapping[str, Any]) -> Weight:
    """A leaf as a plan sees it: its contracted axis last; `axes` says which where the name does not."""
    shape = list(leaf.shape)
    if shape:
        whole, axis, _ = merged(leaf.shape, axes.get(path, contracted_axis(path, len(shape))))
        shape = list(whole)
        shape.append(shape.pop(axis))
    return Weight(path, tuple(shape))


def _quantize_leaf(
    pool: ThreadPoolExecutor, leaf: Any, axis: int, assignment: Assignment, recipe: Recipe, stats: Stats | Array | None
) -> tuple[Any, TensorReport]:
    w, fmt = assignment.weight, assignment.format
    if fmt is None:
        check_finite({w.path: leaf})
        name = leaf.format.name if is_qtensor(leaf) else str(leaf.dtype)
        return leaf, TensorReport(w.path, w.shape, name, leaf.nbytes, kept=assignment.reason)
    if is_qtensor(leaf) and fmt.name in ("F32", "F16", "BF16"):
        leaf = dequantize(leaf)  # no grid but the floats' own: nothing is rounded twice
    if is_qtensor(leaf):
        raise UserError(f"{w}: already quantized to {leaf.format.name}; dequantize it first (--requantize), or keep it")
    note = ""
    if _name(w.path) == "embedding":
        note = LOOKED_UP if recipe.reparams else ""
        recipe = of_embedding(recipe)
    if not recipe.is_plain:
        seen = stats if isinstance(stats, Stats) else Stats(h=stats)
        check_stats(seen, str(w))
        q, line = round_leaf(str(w), leaf, axis, fmt, recipe, seen)
        line = dataclasses.replace(line, note=note) if note else line
        return q, TensorReport(w.path, w.shape, fmt.name, q.nbytes, relative_rmse(q, leaf), calibration=line)
    importance = stats.importance if isinstance(stats, Stats) else stats
    if importance is None and recipe.requires:
        raise UserError(f"{w}: {missing('h')}")
    if isinstance(fmt, BlockFormat):
        rows = np.moveaxis(np.asarray(leaf), axis, -1)
        encoding = encode_tensor(pool, str(w), rows, fmt, None if importance is None else np.asarray(importance))
        raw, error = encoding.result()
        packed = raw.reshape(*rows.shape[:-1], rows.shape[-1] // fmt.block, fmt.block_bytes)
        q = QTensor({"blocks": jnp.asarray(packed)}, fmt, axis, dtype=jnp.asarray(leaf).dtype)
    else:
        if importance is not None and jnp.ndim(importance) > 1:  # of a stack, one for each of its matrices
            importance = jnp.broadcast_to(jnp.expand_dims(importance, -1 if axis == -2 else -2), leaf.shape)
        try:
            q = quantize(leaf, fmt, axis=axis, weight=importance)
        except UserError as e:
            raise UserError(f"{w}: {e}") from None
        error = relative_rmse(q, leaf)
        if not np.isfinite(error):
            raise UserError(f"{w}: its values are too large for {fmt.name}")
    return q, TensorReport(w.path, w.shape, fmt.name, q.nbytes, error)
