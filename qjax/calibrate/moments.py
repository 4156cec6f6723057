"""Running sums over tokens, in float32, one small program whatever the batch.

    H: sum x x^T    h: sum x^2    absmean: sum |x|    absmax: max |x|    cross: sum (x_float - x) x^T    count: tokens

A token whose input is all zeros (an expert that it was not routed to, a masked position) is no token; where it is so in
the float model alone, nobody knows what its input would have been, and it is none of `cross`. Sums of different
batches are added, and divided once at the end; a batch sharded over devices is summed where it lies and reduced.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from qjax.stats import KINDS, Stats
from qjax.typing import Array, Float

SAMPLES = 256
"""Rows kept by the kind "samples"."""


def sums(
    x: Float[Array, "*t n"],
    kinds: Sequence[str],
    x_float: Float[Array, "*t n"] | None = None,
    weight: Float[Array, "*t"] | None = None,
) -> Stats:
    """The sums of one batch.

    Args:
      x: inputs of a weight, any float type.
      kinds: what to sum; see `qjax.stats.KINDS`.
      x_float: the same tokens' inputs in the float model, for "cross".
      weight: how much each token counts in H, h and cross; None: 1.

    Returns: Stats that hold sums.
    """
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    size = jnp.abs(x)
    there = jnp.any(x != 0, axis=1).astype(jnp.float32)
    v = None if weight is None else weight.reshape(-1, 1).astype(jnp.float32)
    xv = x if v is None else x * v
    found: dict[str, Array] = {}
    if "H" in kinds:
        found["H"] = _gram(xv, x)
    if "h" in kinds:
        found["h"] = jnp.sum(xv * x, axis=0)
    if "absmean" in kinds:
        found["absmean"] = jnp.sum(size, axis=0)
    if "absmax" in kinds:
        found["absmax"] = jnp.max(size, axis=0)
    if "cross" in kinds:
        if x_float is None:
            raise ValueError("cross needs the float model's inputs")
        x_float = x_float.reshape(x.shape).astype(jnp.float32)
        off = jnp.where(jnp.any(x_float != 0, axis=1, keepdims=True), x_float - x, 0.0)
        found["cross"] = _gram(off if v is None else off * v, x)
    if "samples" in kinds:
        first = jnp.argsort(1.0 - there)[:SAMPLES]  # stable: rows with something in them, in order
        rows = x[first]
        found["samples"] = jnp.pad(rows, ((0, SAMPLES - rows.shape[0]), (0, 0)))
    return Stats(**found, count=jnp.sum(there))


def add(a: Stats, b: Stats) -> Stats:
    """The sums of two batches together; samples fill up in order."""
    both = {}
    for kind in KINDS:
        x, y = getattr(a, kind), getattr(b, kind)
        if x is None:
            continue
        if kind == "absmax":
            both[kind] = jnp.maximum(x, y)
        elif kind == "samples":
            both[kind] = _fill(x, y, a.count)
        else:
            both[kind] = x + y
    assert a.count is not None and b.count is not None
    return Stats(**both, count=a.count + b.count)


def means(total: Stats) -> Stats:
    """Sums as means over the tokens."""
    assert total.count is not None
    count = jnp.maximum(total.count, 1.0)

    def over(kind: str) -> Array | None:
        a = getattr(total, kind)
        if a is None or kind in ("absmax", "samples"):
            return a
        return a / count.reshape(count.shape + (1,) * (a.ndim - count.ndim))

    return Stats(**{kind: over(kind) for kind in KINDS}, count=total.count)


def _gram(a: Array, b: Array) -> Array:
    """a^T b in full float32."""
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _fill(kept: Array, new: Array, count: Array | None) -> Array:
    assert count is not None
    if count.ndim:  # stacked over a scan
        import jax

        return jax.vmap(_fill)(kept, new, count)
    at = count.astype(jnp.int32) + jnp.arange(new.shape[0])
    return kept.at[at].set(new, mode="drop")
