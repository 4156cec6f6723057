"""What flows into the weights of a piece: its moments, over the windows that are used and over those held out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.calibrate import add, check_stats, means, sums
from qjax.calibrate.observe import mapped
from qjax.compiled import full_float32
from qjax.errors import UserError
from qjax.io.space import let_go
from qjax.lifting import Use, watch
from qjax.models.devices import each_step
from qjax.pipeline.few_tokens import are_few, filled
from qjax.pipeline.passes import Here
from qjax.pipeline.windows import Calibration
from qjax.stats import Stats
from qjax.typing import Array

Sent = tuple[np.ndarray, np.ndarray]  # tokens of each expert among those used, and among those held out


def observe_inputs(
    calibration: Calibration,
    kinds: tuple[str, ...],
    here: Here,
    uses: Sequence[Use],
    whole: Here,
    whole_uses: Sequence[Use],
    params: Any,
    floats: Any,
    weights: Sequence[np.ndarray | None],
    names: Sequence[str],
) -> list[tuple[Stats, Stats | None, Sent | None]]:
    """Means at the inputs of some uses, in one pass: over the windows that are used, and over those held out.

    Those of experts are stacked, and filled up where they saw few tokens, by `whole`, the piece that sends every token
    to each: then what they saw comes too.

    Args:
      here, uses: the place, and the uses that it sees.
      whole, whole_uses: the piece with all tokens sent to all experts, from its beginning, and the same uses there.
      weights: how much the tokens count at each of them.
      names: of a weight there, for messages.
    """
    both = params, floats
    found = _means(calibration, kinds, here, uses, *both, weights)
    made: list[tuple[Stats, Stats | None, Sent | None]] = []
    for use, of_whole, weight, name, (used, held) in zip(uses, whole_uses, weights, names, found, strict=True):
        if not float(jnp.max(jnp.asarray(1 if used.count is None else used.count))):  # tokens pass all of a decoder
            raise UserError(
                f"{name}: its input is zero at every token; the model's weights in front of it are all zeros"
            )
        n = float(math.prod(use.shape[axis] for axis in use.axes))
        part = n * calibration.heldout / calibration.used
        sent = None
        if are_few(used, n) or (held is not None and are_few(held, part)):
            sent = np.asarray(used.count), np.asarray(0.0 if held is None else held.count)
            ((of_all, held_of_all),) = _means(calibration, kinds, whole, (of_whole,), *both, (weight,))
            used = filled(used, of_all, n)
            if held is not None and held_of_all is not None:
                held = filled(held, held_of_all, part)
        check_stats(dataclasses.replace(used, count=None), name)
        made.append((used, held, sent))
    return made


def _means(
    calibration: Calibration,
    kinds: tuple[str, ...],
    here: Here,
    uses: Sequence[Use],
    params: Any,
    floats: Any,
    weights: Sequence[np.ndarray | None],
) -> list[tuple[Stats, Stats | None]]:
    totals: list[list[Stats] | None] = [None, None]
    x_float = (None,) * len(here.x) if here.x_float is None else here.x_float
    static = here.apply, tuple((use.source, use.batch) for use in uses), kinds, len(here.x)
    whole, rows = (params, None if here.x_float is None else floats), (*here.x, *x_float, *weights)
    for at, part in each_step(observe_step, static, whole, rows, calibration.steps):
        which = int(at.start >= calibration.used)
        before = totals[which]
        totals[which] = part if before is None else [add(a, b) for a, b in zip(before, part, strict=True)]
        let_go(*rows)
    used, held = totals
    assert used is not None
    return [(means(a), None if held is None else means(held[i])) for i, a in enumerate(used)]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
@full_float32
def observe_step(
    apply: Callable[..., Any],
    inputs: tuple[tuple[int, int], ...],
    kinds: tuple[str, ...],
    width: int,
    params: Any,
    floats: Any,
    *rows: Array | None,
) -> list[Stats]:
    """The sums of some inputs, (source, batch), for one batch; what lies behind the last is dead code.

    Args:
      width: of what goes into `apply`.
      rows: that, the same in the float model or as many None, and how much the tokens count at each input.
    """
    wanted = {source for source, _ in inputs}
    x, x_float, weights = rows[:width], rows[width : 2 * width], rows[2 * width :]

    def at(params: Any, x: tuple[Array | None, ...]) -> dict[int, Any]:
        return watch(apply, lambda use, v: v if use.source in wanted else None)(params, *x)[1]

    here, there = at(params, x), None if x_float[0] is None else at(floats, x_float)
    found = []
    for (source, batch), weight in zip(inputs, weights, strict=True):
        if there is None:
            found.append(mapped(lambda x, v=weight: sums(x, kinds, None, v), batch)(here[source]))
        else:
            both = mapped(lambda x, x_float, v=weight: sums(x, kinds, x_float, v), batch)
            found.append(both(here[source], there[source]))
    return found
