"""A dot_general with a weight, in one arrangement for all: y[*batch, *tokens, *out] = x[*batch, *tokens, n] . w.

Whatever the order of operands and axes in the program, statistics, taps and adapters see the activation as
[*batch, *tokens, n] and the result as above; `restore` brings a result back to the program's order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from qjax.lifting import packed
from qjax.lifting.weight import Dense, Weight
from qjax.tensor import QTensor, dot

# Jitted, so that layers of equal shape are traced once.
_dot = jax.jit(dot)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """Which axes of a dot_general's activation and weight are which.

    Attributes:
      x_batch, x_free, x_contract: axes of the activation; contracted ones in the order of the weight's stored axes.
      w_batch, w_free, w_contract: axes of the weight, each paired with the activation's.
      weight_first: whether the weight is the first operand.
    """

    x_batch: tuple[int, ...]
    x_free: tuple[int, ...]
    x_contract: tuple[int, ...]
    w_batch: tuple[int, ...]
    w_free: tuple[int, ...]
    w_contract: tuple[int, ...]
    weight_first: bool

    def operand(self, x: Any) -> Any:
        """The activation as [*batch, *tokens, n]: contracted axes last and merged, batch axes first."""
        n = math.prod(x.shape[a] for a in self.x_contract)
        x = x.transpose(*self.x_batch, *self.x_free, *self.x_contract)
        return x.reshape(*x.shape[: len(self.x_batch) + len(self.x_free)], n)

    def arranged(self, x: Any, shape: tuple[int, ...]) -> Any:
        """The inverse of `operand`: an activation of the program's shape and order."""
        order = (*self.x_batch, *self.x_free, *self.x_contract)
        x = x.reshape([shape[a] for a in order])
        return x.transpose([order.index(a) for a in range(len(order))])

    def restore(self, y: Any) -> Any:
        """[*batch, *tokens, *out] in the order that the program's dot_general gives."""
        if not self.weight_first:
            return y
        b, t = len(self.x_batch), len(self.x_free)
        return y.transpose(*range(b), *range(b + t, y.ndim), *range(b, b + t))


def contraction(eqn: Any, x_ndim: int, weight: Weight, weight_first: bool) -> Contraction:
    """Read a dot_general's dimension numbers."""
    contract, batch = eqn.params["dimension_numbers"]
    w, x = (0, 1) if weight_first else (1, 0)
    pairs = sorted(zip(contract[w], contract[x], strict=True), key=lambda pair: (weight.axes[pair[0]], pair[0]))
    return Contraction(
        x_batch=tuple(batch[x]),
        x_free=tuple(a for a in range(x_ndim) if a not in (*batch[x], *contract[x])),
        x_contract=tuple(pair[1] for pair in pairs),
        w_batch=tuple(batch[w]),
        w_free=tuple(a for a in range(len(weight.axes)) if a not in (*batch[w], *contract[w])),
        w_contract=tuple(pair[0] for pair in pairs),
        weight_first=weight_first,
    )


def packed_dot(eqn: Any, c: Contraction, x: Any, q: QTensor) -> Any:
    """The dot_general's result through `qjax.dot`, in the program's order and type.

    Contracted axes besides the quantized one are summed over afterwards, one `dot` for each of their positions.

    Raises:
      Dense: the quantized axis is not among the contracted ones.
    """
    own = packed.quantized_axes(q)
    if not set(own) <= set(c.w_contract):
        contracted = ", ".join(str(a - q.ndim) for a in c.w_contract) or "nothing"
        along = f"axis {q.axis}" if len(own) == 1 else f"axes {', '.join(str(a - q.ndim) for a in own)} together"
        raise Dense(
            f"contracts axis {contracted} of {list(q.shape)}, but its blocks run along {along} "
            "(qjax.contracted_axes finds the right one)"
        )
    partner = dict(zip(c.w_contract, c.x_contract, strict=True))
    summed = [(w, x) for w, x in partner.items() if w not in own]
    mapped = len(c.x_batch) + len(summed)
    w_order = [*c.w_batch, *(w for w, _ in summed)]
    n = math.prod(q.shape[a] for a in own)
    q = packed.transpose(q, [*w_order, *(a for a in range(q.ndim) if a not in w_order)])
    x = x.transpose(*c.x_batch, *(x for _, x in summed), *c.x_free, *(partner[a] for a in own))
    x = x.reshape(*x.shape[: x.ndim - len(own)], n)
    out = eqn.outvars[0].aval.dtype
    # `dot` rounds to x's type; where the program wants more, or partial sums are added up, x gets it first.
    wide = jnp.dtype(jnp.float32) if summed else out
    x = x.astype(wide) if wide.itemsize > x.dtype.itemsize else x
    product = _dot
    for _ in range(mapped):
        product = jax.vmap(product)
    with _precision(eqn.params["precision"]):
        y = product(x, q)
    return c.restore(y.sum(tuple(range(len(c.x_batch), mapped))).astype(out) if summed else y.astype(out))


def _precision(precision: Any) -> Any:
    """A context in which matrix products have the precision, or the algorithm, that a dot_general asks for."""
    first = precision[0] if isinstance(precision, tuple) else precision
    if first is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(first.name.lower() if isinstance(first, jax.lax.Precision) else first.name)
