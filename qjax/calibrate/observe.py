"""What every weight of a model sees, for any pure function of (params, *inputs), in one jitted pass over the batches.

    stats = observe(apply_fn, params, batches, kinds=("H",))         {path: Stats}

`lift.watch` finds the inputs by the weights' paths. Weights that read the same input (q, k and v; gate and up) share
one Stats. Under a scan statistics are stacked as the weights are; where all steps share a weight (a recurrent cell),
every step is a token more.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate.moments import add, means, sums
from qjax.calibrate.stacks import Entry, entry, own_axes, stacked
from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.lifting import Use, report, watch
from qjax.stats import KINDS, Stats
from qjax.typing import Array

Progress = Callable[[int], None]


def observe(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    kinds: Sequence[str] = ("H",),
    *,
    float_params: Any = None,
    progress: Progress = lambda done: None,
) -> dict[str, Stats]:
    """Statistics of the inputs of all weights that are contracted with an activation.

    Args:
      apply_fn: a pure function of (params, *inputs).
      params: its weights, dense or packed; statistics are those of this model.
      batches: inputs; a tuple is spread over the function's arguments. Batches of equal shape share one program. An
        array that is sharded stays so: sums are reduced across devices.
      kinds: of `Stats`: H, h, absmean, absmax, cross, samples.
      float_params: the float model's weights, for "cross".
      progress: called with the number of batches done.

    Returns: {path: Stats}; weights of one shape with the same input have the same object. A weight used several times
      (a layer that is called twice) has the sums of all its uses along the axis of the first; `also` names other axes.

    Raises:
      UserError: no batches, an unknown kind, NaN or Inf in an activation, a weight that nothing reached, a stack of
        which only a part is used or nobody knows which.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown statistic {kind!r}; there are {', '.join(KINDS)}")
    if "cross" in kinds and float_params is None:
        raise UserError("the statistic 'cross' compares with the float model: give float_params")
    total: dict[Entry, Stats] | None = None
    uses: tuple[Use, ...] = ()
    for done, batch in enumerate(batches, 1):
        args = batch if isinstance(batch, tuple) else (batch,)
        if not uses:
            uses = _dots(apply_fn, params, *args)
        part = _pass(apply_fn, tuple(kinds), params, float_params if "cross" in kinds else None, *args)
        total = part if total is None else _add(total, part)
        progress(done)
    if total is None:
        raise UserError("there are no batches to observe")
    return _by_path(uses, total)


def _dots(apply_fn: Callable[..., Any], params: Any, *args: Any) -> tuple[Use, ...]:
    return tuple(use for use in report(apply_fn, params, *args) if use.kind == "dot")


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def _pass(
    apply_fn: Callable[..., Any], kinds: tuple[str, ...], params: Any, floats: Any, *args: Any
) -> dict[Entry, Stats]:
    """The sums of one batch."""
    uses = _dots(apply_fn, params, *args)
    late = {use.source for use in uses if floats is not None or len(entry(use)[1]) < len(use.stacked)}

    def collect(use: Use, x: Array) -> Any:
        """Sums where the input arises, so that a scan's inputs never lie side by side, wherever that will do."""
        if use.kind != "dot":
            return None
        return x if use.source in late else mapped(lambda x: sums(x, kinds), use.batch)(x)

    here = watch(apply_fn, collect)(params, *args)[1]
    there = {} if floats is None else watch(apply_fn, collect)(floats, *args)[1]
    made: dict[Entry, Stats] = {}
    for use in uses:
        x, was = here[use.source], there.get(use.source)
        made[entry(use)] = _summed(use, kinds, x, was) if use.source in late else x
    return made


def _summed(use: Use, kinds: tuple[str, ...], x: Array, was: Array | None) -> Stats:
    """The sums of inputs [*stacked, *picked, *batch, *tokens, n]; steps of a scan that share the weight are tokens."""
    steps = len(use.stacked)
    lead = (*entry(use)[1], *range(steps, steps + len(use.picked) + use.batch))
    order = (*lead, *(axis for axis in range(x.ndim) if axis not in lead))
    x, was = x.transpose(order), None if was is None else was.transpose(order)
    if was is None:
        return mapped(lambda x: sums(x, kinds), len(lead))(x)
    return mapped(lambda x, was: sums(x, kinds, was), len(lead))(x, was)


def mapped(fn: Callable[..., Stats], axes: int) -> Callable[..., Stats]:
    """fn over so many leading axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


@jax.jit
def _add(a: dict[Entry, Stats], b: dict[Entry, Stats]) -> dict[Entry, Stats]:
    return {entry: add(a[entry], b[entry]) for entry in a}


def _by_path(uses: Sequence[Use], total: Mapping[Entry, Stats]) -> dict[str, Stats]:
    parts: dict[str, dict[Any, Use]] = {}
    for use in uses:
        parts.setdefault(use.path, {}).setdefault((entry(use), use.at, use.axes), use)
    found: dict[str, Stats] = {}
    made: dict[Any, Stats] = {}
    for path, of in parts.items():
        axes = list(dict.fromkeys(use.axes for use in of.values()))
        seen = [use for use in of.values() if use.axes == axes[0]]
        key = tuple((entry(use), use.at, own_axes(use), use.shape) for use in seen), tuple(axes)
        if key not in made:
            sums_of = [stacked(total[entry(use)], use) for use in seen]
            axis, *also = (a[0] if len(a) == 1 else a for a in axes)
            made[key] = dataclasses.replace(means(_together(sums_of)), axis=axis, also=tuple(also))
            check_stats(made[key], path)
        found[path] = made[key]
    return found


def _together(parts: Sequence[Stats]) -> Stats:
    """The sums of all uses of a weight; what all matrices of a stack read counts for each of them."""
    leads = [() if p.count is None else p.count.shape for p in parts]
    whole = max(leads, key=len)

    def widened(a: Array, lead: tuple[int, ...]) -> Array:
        rest = a.shape[len(lead) :]
        return jnp.broadcast_to(a.reshape(*lead, *(1,) * (len(whole) - len(lead)), *rest), (*whole, *rest))

    wide = [jax.tree.map(partial(widened, lead=lead), p) for p, lead in zip(parts, leads, strict=True)]
    return functools.reduce(add, wide)


def check_stats(stats: Stats, path: str) -> None:
    """Raise UserError where the statistics of a weight cannot be used: NaN or Inf, or not one token."""
    for kind in stats.kinds:
        bad = int(np.sum(~np.isfinite(np.asarray(getattr(stats, kind)))))
        if bad:
            raise UserError(
                f"{path}: its input has NaN or Inf ({bad} of its {kind} values); the model or the text is broken"
            )
    if stats.count is not None and float(np.min(np.asarray(stats.count))) == 0:
        least = np.asarray(stats.count)
        entry_of = tuple(int(i) for i in np.unravel_index(int(least.argmin()), least.shape))
        which = "" if least.ndim == 0 else f" (entry {entry_of} of its stack)"
        raise UserError(f"{path}{which}: no calibration token reached it; give more or other text, or keep the weight")
