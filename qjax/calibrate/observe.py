"""What every weight of a model sees, for any pure function of (params, *inputs), in one jitted pass over the batches.

    stats = observe(apply_fn, params, batches, kinds=("H",))         {path: Stats}

`lift.watch` finds the inputs by the weights' paths. Weights that read the same input (q, k and v; gate and up) share
one Stats. Under a scan statistics are stacked as the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from qjax.calibrate.moments import add, means, sums
from qjax.errors import UserError
from qjax.lift import Use, report, watch
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

    Returns: {path: Stats}; weights with the same input have the same object. A weight used several times (a layer that
      is called twice) has the sums of all its uses.

    Raises:
      UserError: no batches, an unknown kind, NaN or Inf in an activation, a weight that nothing reached.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"unknown statistic {kind!r}; there are {', '.join(KINDS)}")
    if "cross" in kinds and float_params is None:
        raise UserError("the statistic 'cross' compares with the float model: give float_params")
    total: dict[int, Stats] | None = None
    uses: tuple[Use, ...] = ()
    for done, batch in enumerate(batches, 1):
        args = batch if isinstance(batch, tuple) else (batch,)
        if not uses:
            uses = tuple(u for u in report(apply_fn, params, *args) if u.kind == "dot")
        part = _pass(apply_fn, tuple(kinds), params, float_params if "cross" in kinds else None, *args)
        total = part if total is None else _add(total, part)
        progress(done)
    if total is None:
        raise UserError("there are no batches to observe")
    return _by_path(uses, total)


@partial(jax.jit, static_argnums=(0, 1))
def _pass(
    apply_fn: Callable[..., Any], kinds: tuple[str, ...], params: Any, floats: Any, *args: Any
) -> dict[int, Stats]:
    """The sums of one batch, by source."""
    if floats is None:  # summed where the input arises: a scan's inputs never lie side by side

        def collect(use: Use, x: Array) -> Stats | None:
            return _mapped(lambda x: sums(x, kinds), use.batch)(x) if use.kind == "dot" else None

        found = watch(apply_fn, collect)(params, *args)[1]
        return {source: s for source, s in found.items() if s is not None}

    def inputs(params: Any) -> dict[int, Array]:
        found = watch(apply_fn, lambda use, x: x if use.kind == "dot" else None)(params, *args)[1]
        return {source: x for source, x in found.items() if x is not None}

    here, there = inputs(params), inputs(floats)
    lead = {u.source: len(u.stacked) + u.batch for u in report(apply_fn, params, *args) if u.kind == "dot"}
    return {
        source: _mapped(lambda x, was: sums(x, kinds, was), lead[source])(x, there[source])
        for source, x in here.items()
    }


def _mapped(fn: Callable[..., Stats], axes: int) -> Callable[..., Stats]:
    """fn over so many leading axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


@jax.jit
def _add(a: dict[int, Stats], b: dict[int, Stats]) -> dict[int, Stats]:
    return {source: add(a[source], b[source]) for source in a}


def _by_path(uses: Sequence[Use], total: Mapping[int, Stats]) -> dict[str, Stats]:
    sources: dict[str, tuple[int, ...]] = {}
    for use in uses:
        if use.source not in sources.get(use.path, ()):
            sources[use.path] = (*sources.get(use.path, ()), use.source)
    made: dict[tuple[int, ...], Stats] = {}
    for path, of in sources.items():
        if of not in made:
            joined = total[of[0]]
            for source in of[1:]:
                joined = add(joined, total[source])
            made[of] = means(joined)
            check_stats(made[of], path)
    return {path: made[of] for path, of in sources.items()}


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
        which = "" if least.ndim == 0 else f" (entry {np.unravel_index(int(least.argmin()), least.shape)} of its stack)"
        raise UserError(f"{path}{which}: no calibration token reached it; give more or other text, or keep the weight")
