"""Weighted k-means of vectors, and sums of several such: the codebooks of least sum v (x - sum_m C_m[c_m])^2.

    book 1 of the vectors, book 2 of what book 1 leaves, ...                              residual k-means
    c by beam search over all books, then each C_m[k] the mean of what the others leave its vectors, in turns

Neither step makes the error larger but the beam, which is no search through all sums: the best of the rounds is kept.
Starts are vectors at even strides; an entry that no vector takes is put on a vector that is missed by most. There is no
randomness. AQLM (arXiv:2401.06118, sections 3.1 and 3.2) starts so too, from a random choice.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.storage import over
from qjax.typing import Array, Float, Int, UInt8

LANES = 1024  # vectors side by side
_STEPS, _ROUNDS = 12, 4


def additive_kmeans(
    x: Float[Array, "t k"], v: Float[Array, "t k"], books: int, entries: int, beam: int
) -> Float[Array, "m e k"]:
    """The codebooks of vectors.

    Args:
      x: vectors.
      v: weight of each of their numbers.
      books: m.
      entries: of a book.
      beam: sums that are kept on the way through the books.
    """
    left, found = x, []
    for _ in range(books):
        found.append(_kmeans(left, v, entries))
        left = left - found[-1][nearest_sums(found[-1][None], left, 1, v)[:, 0].astype(jnp.int32)]
    C = jnp.stack(found)
    if books == 1:
        return C

    def error(C: Array, codes: Array) -> Array:
        return jnp.sum(v * jnp.square(x - summed(C, codes)))

    def one(_: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        C, best, least = now
        codes = nearest_sums(C, x, beam, v)
        at_codes = error(C, codes)
        best, least = jnp.where(at_codes < least, C, best), jnp.minimum(at_codes, least)
        return means(C, x, v, codes), best, least

    C, best, least = lax.fori_loop(0, _ROUNDS, one, (C, C, jnp.float32(jnp.inf)))
    return jnp.where(error(C, nearest_sums(C, x, beam, v)) < least, C, best)


def means(
    C: Float[Array, "m e k"], x: Float[Array, "t k"], v: Float[Array, "t k"], codes: UInt8[Array, "t m"]
) -> Float[Array, "m e k"]:
    """Each book in turn at the weighted means of what the others leave its vectors; entries without one stay."""
    for m in range(C.shape[0]):
        own = codes[:, m].astype(jnp.int32)
        off = v * (x - summed(C, codes))
        mass, pull = (jax.ops.segment_sum(a, own, C.shape[1]) for a in (v, off))
        C = C.at[m].add(over(pull, mass))
    return C


def summed(C: Float[Array, "m e k"], codes: UInt8[Array, "*t m"]) -> Float[Array, "*t k"]:
    """sum_m C_m[c_m]."""
    at = codes.astype(jnp.int32)
    parts = [C[m][at[..., m]] for m in range(C.shape[0])]
    return sum(parts[1:], parts[0])


def nearest_sums(
    C: Float[Array, "m e k"],
    x: Float[Array, "t k"],
    beam: int,
    weight: Float[Array, "t k"] | None = None,
    metric: Float[Array, "k k"] | None = None,
) -> UInt8[Array, "t m"]:
    """Codes of sums near vectors, by beam search through the books in order.

    Args:
      beam: sums that go on from one book to the next, those of least error with nothing behind them.
      weight: of the error's numbers; or
      metric: e M e^T is the error; neither: its square.
    """
    M = jnp.eye(C.shape[2], dtype=C.dtype) if metric is None else metric

    def some(x: Array, v: Array) -> Array:
        """e M e^T with e = x - s - c, s the sum so far, less what does not depend on c: c M c - 2 (x - s) M c."""
        sums, codes = x[:, None] * 0.0, jnp.zeros((x.shape[0], 1, 0), jnp.uint8)
        cost = jnp.zeros_like(sums[..., 0])
        for m, book in enumerate(C):
            right = _dot(book, M).T  # [k, e]
            power = _dot(v, right * book.T)[:, None]  # [t, 1, e]
            total = cost[..., None] + power - 2.0 * _dot(v[:, None] * (x[:, None] - sums), right)
            flat = total.reshape(x.shape[0], -1)
            if m + 1 < C.shape[0]:
                cost, best = lax.top_k(-flat, min(beam, flat.shape[1]))
                cost = -cost
            else:
                best = jnp.argmin(flat, axis=1)[:, None]
            before, k = best // C.shape[1], best % C.shape[1]
            sums = jnp.take_along_axis(sums, before[..., None], axis=1) + book[k]
            codes = jnp.take_along_axis(codes, before[..., None], axis=1)
            codes = jnp.concatenate([codes, k[..., None].astype(jnp.uint8)], axis=2)
        return codes[:, 0]

    count = x.shape[0]
    v = jnp.ones_like(x) if weight is None else weight
    turns = -(-count // LANES)
    size = -(-count // turns)
    turned = (jnp.pad(a, ((0, turns * size - count), (0, 0))).reshape(turns, size, -1) for a in (x, v))
    return lax.map(lambda at: some(*at), tuple(turned)).reshape(turns * size, -1)[:count]


def _kmeans(x: Float[Array, "t k"], v: Float[Array, "t k"], entries: int) -> Float[Array, "e k"]:
    start = x[(2 * np.arange(entries) + 1) * x.shape[0] // (2 * entries)]

    def one(_: Array, C: Array) -> Array:
        codes = nearest_sums(C[None], x, 1, v)
        C = _repaired(C, x, v, codes[:, 0].astype(jnp.int32))
        return means(C[None], x, v, nearest_sums(C[None], x, 1, v))[0]

    return lax.fori_loop(0, _STEPS, one, start)


def _repaired(C: Array, x: Array, v: Array, code: Int[Array, "t"]) -> Array:
    """Entries that no vector takes moved, one after another, to the vectors that are missed by most."""
    unused = jax.ops.segment_sum(jnp.ones_like(code), code, C.shape[0]) == 0
    missed, worst = lax.top_k(jnp.sum(v * jnp.square(x - C[code]), axis=1), min(C.shape[0], x.shape[0]))
    rank = jnp.clip(jnp.cumsum(unused.astype(jnp.int32)) - 1, 0, worst.shape[0] - 1)
    return jnp.where((unused & (missed[rank] > 0))[:, None], x[worst[rank]], C)


def _dot(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((a.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
