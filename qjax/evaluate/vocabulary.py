"""What is asked of a distribution over a vocabulary, from scores that exist for a chunk of it at a time.

    p = softmax(z_base)      q = softmax(z)      d = z - z_base      mu = E_p[d]      delta = d - mu

    KL(p || q) = ln E_p[e^delta] = ln(1 + R),        R = E_p[rem(delta)],      rem(x) = e^x - 1 - x >= 0

whose terms are all non-negative: nothing cancels, equal scores give exactly 0, and a KL of 1e-9 still has correct
digits. Two chunks a and b, with the shares alpha and beta = 1 - alpha of p's mass, make one:

    mu = alpha mu_a + beta mu_b
    R  = sum over both of alpha (e^h R_a + rem(h)),    h = mu_a - mu

for E_a[e^(d - mu)] = e^h (1 + R_a) and E_a[d - mu] = h. So the scores are made once, however large the vocabulary.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.typing import Array, Float, Int

_FAR = 10.0  # where q lifts a token by more than e^10, the plain sum is accurate enough
_MOST = 60.0  # whose exponential float32 holds, with room for a sum


@partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Seen:
    """One model's scores z of the part of the vocabulary seen so far, for each position.

    Attributes:
      lse: ln sum e^z.
      true: z of the true token; 0 where it was not among them.
      top, best: the largest z and the first token that has it.
    """

    lse: Float[Array, "n"]
    true: Float[Array, "n"]
    top: Float[Array, "n"]
    best: Int[Array, "n"]


@partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class Apart:
    """Two models' scores of the part of the vocabulary seen so far: mu, R, the largest d, and whether an exponential
    was cut off on the way; see the module's docstring."""

    mean: Float[Array, "n"]
    rest: Float[Array, "n"]
    most: Float[Array, "n"]
    cut: Array


def nothing_seen(n: int) -> Seen:
    """Before the first chunk."""
    low = jnp.full(n, -jnp.inf, jnp.float32)
    return Seen(low, jnp.zeros(n, jnp.float32), low, jnp.zeros(n, jnp.int32))


def nothing_apart(n: int) -> Apart:
    """Before the first chunk."""
    zero = jnp.zeros(n, jnp.float32)
    return Apart(zero, zero, jnp.full(n, -jnp.inf, jnp.float32), jnp.zeros(n, bool))


def see(seen: Seen, z: Float[Array, "n v"], tokens: Int[Array, "v"], target: Int[Array, "n"]) -> Seen:
    """With one more chunk: z of `tokens`, -inf for those that do not count."""
    hit = (tokens[None] == target[:, None]) & (z > -jnp.inf)
    at, top = jnp.argmax(z, axis=1), jnp.max(z, axis=1)
    return Seen(
        jnp.logaddexp(seen.lse, jax.nn.logsumexp(z, axis=1)),
        seen.true + jnp.sum(jnp.where(hit, z, 0.0), axis=1),
        jnp.maximum(seen.top, top),
        jnp.where(top > seen.top, tokens[at], seen.best),
    )


def part(apart: Apart, before: Seen, z_base: Float[Array, "n v"], z: Float[Array, "n v"]) -> Apart:
    """With one more chunk; `before` is what was seen of the base without it."""
    own = z_base > -jnp.inf
    lse = jax.nn.logsumexp(z_base, axis=1)
    p = jnp.exp(z_base - lse[:, None])
    d = jnp.where(own, z, 0.0) - jnp.where(own, z_base, 0.0)
    mean = jnp.sum(p * d, axis=1)
    delta = d - mean[:, None]
    rest = jnp.sum(p * _rem(jnp.minimum(delta, _MOST)), axis=1)
    whole = jnp.logaddexp(before.lse, lse)
    alpha, beta = jnp.exp(before.lse - whole), jnp.exp(lse - whole)
    mu = alpha * apart.mean + beta * mean
    cut = apart.cut | (jnp.max(delta, axis=1) > _MOST)
    total = jnp.zeros_like(mu)
    for share, r, m in ((alpha, apart.rest, apart.mean), (beta, rest, mean)):
        h = jnp.where(share > 0, m - mu, 0.0)
        cut |= h > _MOST
        h = jnp.minimum(h, _MOST)
        total += share * (jnp.exp(h) * r + _rem(h))
    most = jnp.maximum(apart.most, jnp.max(jnp.where(own, d, -jnp.inf), axis=1))
    return Apart(mu, total, most, cut)


def nll(seen: Seen) -> Float[Array, "n"]:
    """-ln softmax(z)[true token]."""
    return seen.lse - seen.true


def kl(base: Seen, seen: Seen, apart: Apart) -> Float[Array, "n"]:
    """KL(softmax(z_base) || softmax(z))."""
    plain = jnp.maximum(seen.lse - base.lse - apart.mean, 0.0)
    return jnp.where(apart.cut | (apart.most - apart.mean > _FAR), plain, jnp.log1p(apart.rest))


def kl_of(z_base: Float[Array, "n v"], z: Float[Array, "n v"]) -> Float[Array, "n"]:
    """KL(softmax(z_base) || softmax(z)) of each row, without cancellation."""
    n, vocab = z.shape
    tokens, target, empty = jnp.arange(vocab), jnp.zeros(n, jnp.int32), nothing_seen(n)
    base, seen = (see(empty, s, tokens, target) for s in (z_base, z))
    return kl(base, seen, part(nothing_apart(n), empty, z_base, z))


def nll_of(logits: Float[Array, "n v"], target: Int[Array, "n"]) -> Float[Array, "n"]:
    """-ln softmax(logits)[target]."""
    tokens = jnp.arange(logits.shape[1])
    return nll(see(nothing_seen(len(logits)), logits, tokens, target))


def _rem(x: Any) -> Any:
    """e^x - 1 - x >= 0, by its series near 0, where the difference would cancel."""
    series = 0.5 * x * x * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    return jnp.where(jnp.abs(x) < 0.25, series, jnp.expm1(x) - x)
