"""QA-LoRA: adapters that are constant inside each quantization group, and so merge into the groups' float zeros.

    y  = x . W_hat + scale (pool(x) . A) . B       pool(x): sums of x over each group of g;  A [n / g, r], B [r, out]
       = x . W'                                    W' = s (q - z'),  z' = z - scale A B / s;  codes q, scales s stay

Where a format stores w = s q + m with a float m (Q4_1, Q5_1), m' = m + scale A B. Sums, not means: a mean would only
divide A by g. Xu et al., arXiv:2309.14717, section 3 and algorithm 1.

The merge is exact but for the rounding of z' to its type. `apply_pooled` rounds z' in the forward already, straight
through: the merged model is the trained one, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.grid import Grid
from qjax.formats.storage import FLOATS, over
from qjax.formats.stores import Stored
from qjax.lifting import lift
from qjax.tensor import QTensor, dequantize
from qjax.training.adapters.lora import (
    LAYERS,
    Adapter,
    Adapters,
    check_rank,
    init_adapters,
    map_adapted,
    matching,
    product,
    sides,
)
from qjax.training.adapters.merging import Merged, check_bare, merge_each
from qjax.typing import Array, Float


def init_pooled(
    params: Any, rank: int = 64, alpha: float = 16.0, patterns: Sequence[str] = LAYERS, *, key: Array
) -> dict[str, Adapter]:
    """Adapters of pooled inputs that change nothing yet: A [n / g, r] uniform in +-1 / sqrt(n), and B = 0.

    Args:
      params: packed in formats of groups with float zeros, such as uint4_g64_zf16 or Q4_1.
      rank, alpha, patterns, key: as for `init_adapters`; rank is at most the number of groups.

    Raises:
      UserError: another format, a reparametrized weight, a rank above n / g or out; what `init_adapters` raises.
    """
    groups = {path: groups_of(path, leaf) for path, leaf in matching(params, patterns).items()}
    adapters = init_adapters(params, rank, alpha, patterns, key=key)
    for path, adapter in adapters.items():
        check_rank(f"{path}, by groups", rank, groups[path], adapter.b.shape[-1])
        every = adapter.a.shape[-2] // groups[path]
        adapters[path] = dataclasses.replace(adapter, a=adapter.a[..., ::every, :])
    return adapters


def apply_pooled(apply: Callable[..., Any], params: Any, adapters: Adapters, *inputs: Any, **options: Any) -> Any:
    """Run a model as its merge will be: zeros rounded to their type, the gradient straight through that rounding.

    Args:
      apply: a pure function of (params, *inputs).
      params: packed, those with adapters as `init_pooled` wants them; no gradient reaches them.
      adapters: {path: Adapter} of pooled inputs.
      *inputs, **options: what apply takes.
    """
    weights = map_adapted(pooled_weight, lax.stop_gradient(params), adapters)
    return lift(apply)(weights, *inputs, **options)


def pooled_weight(path: str, q: QTensor, adapter: Adapter) -> Float[Array, "*w"]:
    """`dequantize(with_zeros(path, q, adapter))`, with the gradient of W_hat + the repeated scale A B."""
    delta = _by_rows(adapter)  # [*b, out, G]
    soft = _repeated(delta, q.shape[q.axis], -1)
    hard = dequantize(with_zeros(path, lax.stop_gradient(q), lax.stop_gradient(adapter)))
    return _straight_through(hard, soft if q.axis == -1 else jnp.swapaxes(soft, -1, -2))


def with_zeros(path: str, q: Any, adapter: Adapter) -> QTensor:
    """The weight with the adapter in its zeros: codes and scales as they are."""
    _check_fits(path, q, adapter)
    return _with_zeros(q, adapter)


def merge_zeros(params: Any, adapters: Adapters) -> Merged:
    """Merge adapters of pooled inputs into the zeros of their weights.

    `errors` compares with W_hat + scale A B in float32, the weight of training beside the base: what rounding the zeros
    costs. After training by `apply_pooled` nothing is lost.

    Args:
      params: the packed base.
      adapters: {path: Adapter} of pooled inputs.
    """

    def beside(path: str, q: QTensor, adapter: Adapter) -> Array:
        delta = _repeated(_by_rows(adapter), q.shape[q.axis], -1)
        return dequantize(q) + (delta if q.axis == -1 else jnp.swapaxes(delta, -1, -2))

    return merge_each("exact-zeros", params, adapters, with_zeros, beside)


@jax.jit
def _with_zeros(q: QTensor, adapter: Adapter) -> QTensor:
    fmt, delta = q.format, _by_rows(adapter)
    scales, codes = fmt.unpack(q.leaves)
    s, m = fmt.columns(scales, codes.shape)
    zero = fmt.scaling.zero if isinstance(fmt, Grid) else None
    if zero is not None:
        scales = scales | zero.put(scales, zero.get(scales) - over(delta, s))
    else:
        assert m is not None
        scales = fmt.store(scales, (s, m + delta))
    return QTensor(fmt.pack(scales, codes), fmt, q.axis, dtype=q.dtype)


@jax.custom_vjp
def _straight_through(hard: Array, soft: Array) -> Array:
    return hard


_straight_through.defvjp(lambda hard, soft: (hard, None), lambda _, g: (None, g))


def _by_rows(adapter: Adapter) -> Float[Array, "*b out g"]:
    """scale A B, arranged as a QTensor's leaves are: the groups behind the outputs."""
    return jnp.swapaxes(product(adapter), -1, -2)


def _repeated(x: Array, n: int, axis: int) -> Array:
    return jnp.repeat(x, n // x.shape[axis], axis=axis)


def groups_of(path: str, q: Any) -> int:
    """The groups n / g along the contracted axis of a weight.

    Raises:
      UserError: not packed, behind a reparametrization, or in a format without float zeros.
    """
    fmt = q.format if isinstance(q, QTensor) else None
    store = (fmt.scaling.offset or fmt.scaling.zero) if isinstance(fmt, Grid) else None
    if fmt is None or not (isinstance(store, Stored) and store.kind in FLOATS):
        what = "dense" if fmt is None else fmt.name
        raise UserError(
            f"{path} is {what}: exact merging wants groups with float zeros, such as uint4_g64_zf16, or Q4_1, Q5_1"
        )
    check_bare(path, q)
    count: int = jax.eval_shape(lambda leaves: store.get(fmt.unpack(leaves)[0]), q.leaves).shape[-1]
    return count


def _check_fits(path: str, q: Any, adapter: Adapter) -> None:
    lead, _, out = sides(path, q)
    groups, rank = groups_of(path, q), adapter.a.shape[-1]
    want = (*lead, groups, rank), (*lead, rank, out)
    if (tuple(adapter.a.shape), tuple(adapter.b.shape)) != want:
        raise UserError(
            f"{path}: an adapter with a {adapter.a.shape} and b {adapter.b.shape} does not fit; {groups} groups want "
            f"a {want[0]} and b {want[1]}"
        )
