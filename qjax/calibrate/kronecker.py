"""The curvature of a whole weight as two small ones, H_O (x) H_I: how errors of rows and of columns meet in the loss.

    F = E[vec(G) vec(G)^T] ~ H_O (x) H_I        loss of an error E:  tr(H_O E H_I E^T)
    H_I = E[G^T H_O G] / |H_O|^2                H_O = E[G H_I G^T] / |H_I|^2          beginning with 1, in rounds

    sketch B   G = sum_t g_t x_t^T, of a sequence        what the tokens of a sequence say together
    sketch A   G = g_t x_t^T, of each token alone        more samples, and no word of how tokens go together

Each half is the best there is beside the other; rounds are power iterations toward the nearest Kronecker product. Each
is known up to a factor. `round_two_sided` and recipes with `two_sided` round in the two: H is H_I and G is H_O.

Source: YAQA, arXiv:2505.22988, its sketches A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from qjax.calibrate.gradients import Loss, chosen, own_labels, summed
from qjax.errors import UserError
from qjax.stats import Stats
from qjax.typing import Array, Float

Factors = tuple[Float[Array, "m m"], Float[Array, "n n"]]


def kronecker(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    key: Array,
    *,
    paths: Collection[str] | None = None,
    sketch: Literal["A", "B"] = "B",
    rounds: int = 1,
    loss: Loss = own_labels,
) -> dict[str, Stats]:
    """H_I and H_O of a model's matrices, by gradients.

    Args:
      apply_fn: a pure function of (params, *inputs) that gives logits f32[sequences, *t, vocab].
      params: its weights.
      batches: inputs, sequences first; gone through once a round.
      key: of the labels that are drawn.
      paths: the weights, for each of which out^2 + in^2 numbers are in memory; None: all that are matrices.
      sketch: what one sample is.
      rounds: passes; the first begins with 1.
      loss: of the output of one sequence.

    Returns: {path: Stats(H=H_I f32[n, n], G=H_O f32[1, m, m], count=tokens)}.

    Raises:
      UserError: as `summed`; another sketch, no rounds.
    """
    if sketch not in ("A", "B") or rounds < 1:
        raise UserError(f"kronecker: sketch is A or B and rounds at least 1, got {sketch!r}, {rounds}")
    batches = list(batches)
    uses = chosen(apply_fn, params, batches, paths)
    axes = {path: use.axes[0] for path, use in uses.items()}
    factors: dict[str, Factors] = {
        path: (jnp.eye(use.shape[-3 - axes[path]]), jnp.eye(use.shape[axes[path]])) for path, use in uses.items()
    }
    of = by_sequence if sketch == "B" else by_token
    for _ in range(rounds):
        sums, tokens, sequences = summed(apply_fn, params, batches, key, loss, of, factors)
        samples = tokens if sketch == "A" else dict.fromkeys(tokens, sequences)
        factors = {path: _beside(both, factors[path], samples[path]) for path, both in sums.items()}
    return {p: Stats(H=H_I, G=H_O[None], count=tokens[p], axis=axes[p]) for p, (H_O, H_I) in factors.items()}


def _beside(sums: Factors, before: Factors, samples: Array | int) -> Factors:
    """Each half as the best there is beside the other as it was: a mean over samples, over |other|^2."""
    H_O, H_I = (jnp.sum(jnp.square(H)) for H in before)
    return sums[0] / (samples * H_I), sums[1] / (samples * H_O)


def by_sequence(factors: Factors, x: Float[Array, "t n"], g: Float[Array, "t m"]) -> Factors:
    """G H_I G^T and G^T H_O G, with G of all tokens."""
    H_O, H_I = factors
    G = _dot(g.T, x)
    return _dot(_dot(G, H_I), G.T), _dot(_dot(G.T, H_O), G)


def by_token(factors: Factors, x: Float[Array, "t n"], g: Float[Array, "t m"]) -> Factors:
    """The sums over tokens of (x H_I x^T) g g^T and (g H_O g^T) x x^T."""
    H_O, H_I = factors
    of_x, of_g = (jnp.sum(_dot(a, H) * a, axis=1, keepdims=True) for a, H in ((x, H_I), (g, H_O)))
    return _dot(g.T, of_x * g), _dot(x.T, of_g * x)


def _dot(a: Array, b: Array) -> Array:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST)
