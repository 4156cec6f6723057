"""A ragged dot: rows of an activation sorted by expert, and how many of them each expert has.

y[r] = x[r] . W[e(r)]      e(r): the expert in whose group row r lies; rows behind the last group have none
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax.lifting.contract import Contraction
from qjax.lifting.picked import Picked
from qjax.lifting.weight import Weight


def is_by_groups(eqn: Any, values: Any) -> bool:
    """Whether a ragged dot has a stack of matrices as its weight, x [rows, n] and one list of group sizes."""
    d = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), (batch, _) = d.dot_dimension_numbers
    return (
        isinstance(values[1], Weight)
        and not any(isinstance(v, Weight) for v in (values[0], *values[2:]))
        and len(d.rhs_group_dimensions) == 1
        and len(batch) == 0
        and values[0].ndim == 2
        and values[2].ndim == 1
        and d.lhs_ragged_dimensions[0] not in contract
        and eqn.params.get("group_offset") is None
    )


def as_picked(eqn: Any, values: Any) -> tuple[Weight, Contraction]:
    """The same as if each row had picked its own matrix: what statistics need to know."""
    d, (x, weight, sizes, *_) = eqn.params["ragged_dot_dimension_numbers"], values
    (x_contract, w_contract), _ = d.dot_dimension_numbers
    (group,), (row,) = d.rhs_group_dimensions, d.lhs_ragged_dimensions
    labels = weight.axes[group]
    known = len(labels) == 1 and weight.stored[labels[0][0]] == weight.shape[group]
    ends = jnp.cumsum(sizes)
    entry = jnp.searchsorted(ends, jnp.arange(x.shape[row], dtype=ends.dtype), side="right")
    stored = labels[0][0] if labels else -len(weight.stored)
    new = 1 + max((label for p in weight.picks for label in p.labels), default=-1)
    pick = Picked(stored, (new,), index=entry) if known else Picked(stored)
    axes = tuple(((new,),) if a == group else of for a, of in enumerate(weight.axes))
    contraction = Contraction(
        x_batch=(row,),
        x_free=(),
        x_contract=tuple(x_contract),
        w_batch=(group,),
        w_free=tuple(a for a in range(len(axes)) if a not in (group, *w_contract)),
        w_contract=tuple(w_contract),
        weight_first=False,
    )
    return dataclasses.replace(weight, axes=axes, picks=(*weight.picks, pick)), contraction
