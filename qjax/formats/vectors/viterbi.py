"""The best path through a bitshift trellis, and the best of those that bite their tail: Viterbi's algorithm.

    s_t = (s_{t-1} << k | symbol_t) mod 2^L        least sum_t |x_t - value(s_t)|^2 in the weight of each number

A state is the window of the last L bits of a stream of k bits a step. Between two steps all that matters of a path is
its last L - k bits, the *seam*: a step goes from the seam s >> k to the seam s mod 2^(L - k), and the best of the 2^k
states that lead to a seam is remembered. A path that starts and ends on one seam bites its tail: it is a ring of T
symbols, T k bits in all, and any window of the ring is a state.

The best ring among all would take a search for each seam. As in QTIP (arXiv:2406.11235, algorithm 4) a search without
ends from the middle on, around and back to it says which seam lies between the last and the first symbol; then the
best ring over that seam is found. Paths are the minor axis, so that every step is arithmetic on whole vectors.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from qjax.formats.vectors.smallest import smallest
from qjax.typing import Array, Float, Int

AT_ONCE = 1 << 17
"""States of all paths that are searched together: as many as a cache holds; 16 MB of choices for 256 steps."""

LANES = 8  # paths of a vector; of large states one path alone, whose states are its vectors
_UNROLL = 4  # steps at a time: a quarter less time where states are few


def rings(
    x: Float[Array, "paths T V"], weight: Float[Array, "paths T V"], values: Float[Array, "S V"], k: int
) -> Int[Array, "paths T"]:
    """The symbols of the ring near each sequence, i32 in [0, 2^k).

    Args:
      x: what the values shall be.
      weight: of each squared error.
      values: of each of the 2^L states.
      k: bits of a symbol, at most 8 and L - 1.
    """
    paths, T, _ = x.shape
    most = AT_ONCE // values.shape[0]
    lanes = 1 if most < LANES else min(most, LANES * -(-paths // LANES))
    chunks = -(-paths // lanes)

    def chunked(a: Array) -> Array:
        """[paths, T, V] -> [chunks, T, V, lanes]."""
        a = jnp.pad(a, ((0, chunks * lanes - paths), (0, 0), (0, 0)))
        return a.reshape(chunks, lanes, *a.shape[1:]).transpose(0, 2, 3, 1)

    found = lax.map(lambda at: _ring(at[0], at[1], values, k), (chunked(x), chunked(weight)))
    return found.transpose(0, 2, 1).reshape(chunks * lanes, T)[:paths]


def _ring(x: Array, weight: Array, values: Array, k: int) -> Int[Array, "T lanes"]:
    middle = x.shape[0] // 2
    free = best_path(jnp.roll(x, middle, axis=0), jnp.roll(weight, middle, axis=0), values, k, None)
    seam = free[middle] >> k  # the state of the first symbol, once rolled back, begins with it
    return best_path(x, weight, values, k, seam) & (2**k - 1)


def best_path(
    x: Float[Array, "T V lanes"],
    weight: Float[Array, "T V lanes"],
    values: Float[Array, "S V"],
    k: int,
    seam: Int[Array, "lanes"] | None,
) -> Int[Array, "T lanes"]:
    """The states of the path of least error, i32; with a seam, of those that start and end on it."""
    seams, lanes = values.shape[0] >> k, x.shape[2]
    at = lax.broadcasted_iota(jnp.int32, (seams, lanes), 0)
    first = jnp.zeros((seams, lanes), jnp.float32)
    first = first if seam is None else jnp.where(at == seam[None], 0.0, jnp.inf)

    def step(best: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        off = now[0][None] - values[:, :, None]
        cost = jnp.sum(now[1][None] * off * off, axis=1).reshape(seams, 2**k, lanes) + best[:, None]
        least, choice = smallest(cost.reshape(2**k, seams, lanes))
        return least, choice.astype(jnp.uint8)

    best, choices = lax.scan(step, first, (x, weight), unroll=_UNROLL)
    last = jnp.argmin(best, axis=0).astype(jnp.int32) if seam is None else seam

    def back(now: Array, choice: Array) -> tuple[Array, Array]:
        top = jnp.take_along_axis(choice, now[None], axis=0)[0].astype(jnp.int32)
        state = top * seams + now
        return state >> k, state

    return lax.scan(back, last, choices, reverse=True)[1]
