"""H of each group of a weight's rows, in which tokens count by what the loss minds there.

    H_k = E[s_k x x^T]        s_k = mean over the rows i of group k of (dL/dy_i)^2

The loss of an error, to second order, is sum_i E[(dL/dy_i)^2 (e_i x)^2] where outputs do not meet: an H of its own for
every row, of which groups of rows take the mean. `options(guided=4)` rounds each group in its own; with one group it is
what `sensitive` does.

Source: GuidedQuant, arXiv:2505.07004, there with four groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax.calibrate.gradients import Loss, chosen, own_labels, summed
from qjax.errors import UserError
from qjax.stats import Stats
from qjax.typing import Array, Float


def guided(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    key: Array,
    *,
    groups: int = 4,
    paths: Collection[str] | None = None,
    loss: Loss = own_labels,
) -> dict[str, Stats]:
    """H of row groups of a model's matrices, by gradients.

    Args:
      apply_fn: a pure function of (params, *inputs) that gives logits f32[sequences, *t, vocab].
      params: its weights.
      batches: inputs, sequences first.
      key: of the labels that are drawn.
      groups: of rows of one weight, one after the other.
      paths: the weights; None: all that are matrices.
      loss: of the output of one sequence.

    Returns: {path: Stats(H=f32[groups, n, n], count=tokens, once a group)}.

    Raises:
      UserError: as `summed`; a weight whose rows are no such groups.
    """
    batches = list(batches)
    uses = chosen(apply_fn, params, batches, paths)
    axes = {path: use.axes[0] for path, use in uses.items()}
    for path, use in uses.items():
        rows = use.shape[-3 - axes[path]]
        if groups < 1 or rows % groups:
            raise UserError(f"{path}: {rows} rows are no {groups} groups of one size")
    of = partial(_weighed, groups)
    sums, tokens, _ = summed(apply_fn, params, batches, key, loss, of, dict.fromkeys(uses, ()))
    counts = {path: jnp.broadcast_to(tokens[path], (groups,)) for path in sums}
    return {path: Stats(H=H / tokens[path], count=counts[path], axis=axes[path]) for path, H in sums.items()}


def _weighed(groups: int, given: Any, x: Float[Array, "t n"], g: Float[Array, "t m"]) -> Float[Array, "k n n"]:
    del given
    s = jnp.mean(jnp.square(g).reshape(len(g), groups, -1), axis=2)  # [t, k]
    return lax.map(lambda v: lax.dot(x.T, v[:, None] * x, precision=lax.Precision.HIGHEST), s.T)
