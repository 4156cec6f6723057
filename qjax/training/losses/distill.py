"""Distillation: how far the student's next-token distribution q is from the teacher's p, as a loss for the student.

    D(p, q) = sum_v f(log p_v, log q_v),      p = softmax(z_teacher / T),  q = softmax(z_student / T)

    fkl     KL(p || q)                                  f = p (log p - log q)         the default
    rkl     KL(q || p)                                  f = q (log q - log p)
    jsd     beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q
    cakld   b KL(q || p) + (1 - b) KL(p || q)

    loss = T^2 x mean over valid tokens of D(p, q)

jsd is the generalized Jensen-Shannon divergence of GKD (arXiv:2306.13649, section 2); cakld is BitDistiller's
(arXiv:2402.10631, section 3), where b is the teacher's mean confidence in the labels, measured once before training
by `teacher_confidence`; T^2 keeps gradients of one size over T (Hinton et al., arXiv:1503.02531, section 2).

All divergences are sums over the vocabulary of one term f, so each way to evaluate the sum serves all of them: the
whole vocabulary here, chunked.py for vocabularies that do not fit, topk.py for a teacher that was stored. The
gradient flows to the student only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.typing import Array, Float, Integer, Shaped

Divergence = Callable[[Array, Array], Array]  # (log p, log q) -> f, elementwise; hashable, so that jit can hold it

FLOOR = -1e30  # stands for log 0: its exponential is 0, and 0 times a difference of two is 0 and not NaN


def forward_kl(log_p: Array, log_q: Array) -> Array:
    """The term of KL(p || q)."""
    return jnp.exp(log_p) * (log_p - log_q)


def reverse_kl(log_p: Array, log_q: Array) -> Array:
    """The term of KL(q || p)."""
    return forward_kl(log_q, log_p)


@dataclasses.dataclass(frozen=True)
class JensenShannon:
    """The term of beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise UserError(f"jsd: the share of p must lie between 0 and 1, got {self.beta}")

    def __call__(self, log_p: Array, log_q: Array) -> Array:
        a, b, d = math.log(self.beta), math.log1p(-self.beta), log_q - log_p
        m_over_p, m_over_q = jnp.logaddexp(a, b + d), jnp.logaddexp(a - d, b)  # logs; both stay exact where d is large
        return -self.beta * jnp.exp(log_p) * m_over_p - (1 - self.beta) * jnp.exp(log_q) * m_over_q


@dataclasses.dataclass(frozen=True)
class ConfidenceAware:
    """The term of b KL(q || p) + (1 - b) KL(p || q)."""

    b: float

    def __post_init__(self) -> None:
        if not 0 <= self.b <= 1:
            raise UserError(f"cakld: the share of reverse KL must lie in [0, 1], got {self.b}")

    def __call__(self, log_p: Array, log_q: Array) -> Array:
        return self.b * reverse_kl(log_p, log_q) + (1 - self.b) * forward_kl(log_p, log_q)


def divergence(name: str = "fkl", b: float | None = None) -> Divergence:
    """A divergence by its name in a config.

    Args:
      name: fkl, rkl, jsd or cakld.
      b: jsd: the share of the teacher in the mixture, 0.5 if None; cakld: the share of reverse KL.

    Raises:
      UserError: an unknown name, a share out of range, none for cakld, or one for a divergence that has none.

    >>> divergence("cakld", b=0.7)
    ConfidenceAware(b=0.7)
    """
    if name in ("fkl", "rkl"):
        if b is not None:
            raise UserError(f"{name} has no share to set, got b = {b}")
        return forward_kl if name == "fkl" else reverse_kl
    if name == "jsd":
        return JensenShannon() if b is None else JensenShannon(b)
    if name == "cakld":
        if b is None:
            raise UserError("cakld needs b, the teacher's mean confidence in the labels; measure it on a few batches")
        return ConfidenceAware(b)
    raise UserError(f"no divergence is called {name!r}; there are fkl, rkl, jsd and cakld")


def distill_loss(
    teacher_logits: Float[Array, "*b v"],
    student_logits: Float[Array, "*b w"],
    divergence: Divergence = forward_kl,
    mask: Shaped[Array, "*b"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """T^2 times the mean divergence over valid tokens.

    Args:
      teacher_logits, student_logits: floats [*b, v]; the log-softmax is in float32.
      divergence: from `divergence(name)`.
      mask: [*b]; True (or a positive weight) where a token counts. None: all count.
      temperature: T, which divides both logits.

    Returns: f32 scalar, 0 where no token counts.

    Raises:
      UserError: vocabularies of two sizes, or a temperature that is not positive.

    >>> z = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    >>> print(f"{distill_loss(z, jnp.zeros((1, 3))):.4f}")  # ln 3 less the teacher's entropy
    0.0589
    """
    check_alike(teacher_logits.shape[-1], student_logits.shape[-1], temperature)
    log_p = log_probabilities(lax.stop_gradient(teacher_logits), temperature)
    log_q = log_probabilities(student_logits, temperature)
    return temperature**2 * token_mean(divergence(log_p, log_q).sum(axis=-1), mask)


def teacher_confidence(teacher: Callable[[Any], Array], batches: Iterable[tuple[Any, ...]]) -> float:
    """The b of CAKLD: the mean over sequences of the mean probability that the teacher gives to the labels.

    Args:
      teacher: tokens [b, t] -> logits [b, t, v]; best jitted.
      batches: (tokens [b, t], labels [b, t]) or (tokens, labels, mask [b, t]); labels are the next tokens. Sequences
        without a valid token do not count.

    Raises:
      UserError: no valid token in any batch.
    """
    total = count = 0.0
    for tokens, labels, *mask in batches:
        valid = jnp.asarray(mask[0]) if mask else jnp.ones(labels.shape, bool)
        part = _label_probability(teacher(tokens), jnp.asarray(labels), valid)
        total, count = total + float(part[0]), count + float(part[1])
    if not count:
        raise UserError("the teacher's confidence needs at least one batch with a valid label")
    return total / count


def relative_mse(
    teacher_h: Float[Array, "*b d"], student_h: Float[Array, "*b d"], mask: Shaped[Array, "*b"] | None = None
) -> Float[Array, ""]:
    """Mean squared difference of hidden states over the teacher's variance, both over what counts: f32 scalar.

    1 is as good as the teacher's mean everywhere; the scale does not depend on the layer.
    """
    teacher = lax.stop_gradient(teacher_h).astype(jnp.float32)

    def mean(x: Array) -> Array:
        return jnp.mean(x) if mask is None else token_mean(x.mean(axis=-1), mask)

    error = mean(jnp.square(student_h.astype(jnp.float32) - teacher))
    variance = mean(jnp.square(teacher - mean(teacher)))
    return error / jnp.maximum(variance, jnp.finfo(jnp.float32).tiny)


def log_probabilities(logits: Float[Array, "*b v"], temperature: float = 1.0) -> Float[Array, "*b v"]:
    """log softmax(z / T) in float32, with FLOOR for log 0."""
    return jnp.maximum(jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1), FLOOR)


def token_mean(loss: Float[Array, "*b"], mask: Shaped[Array, "*b"] | None) -> Float[Array, ""]:
    """Mean over the tokens that count, weighted by the mask; 0 where there is none."""
    if mask is None:
        return loss.mean()
    weight = mask.astype(jnp.float32)
    total = weight.sum()
    return jnp.where(weight > 0, weight * loss, 0.0).sum() / jnp.where(total > 0, total, 1.0)


@jax.jit
def _label_probability(
    logits: Float[Array, "b t v"], labels: Integer[Array, "b t"], mask: Shaped[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over sequences of the mean probability of their valid labels, and the number of sequences with any."""
    log_p = jnp.take_along_axis(log_probabilities(logits), labels[..., None], axis=-1)[..., 0]
    means = jax.vmap(token_mean)(jnp.exp(log_p), mask)
    return means.sum(), mask.astype(bool).any(axis=1).astype(jnp.float32).sum()


def check_alike(v_teacher: int, v_student: int, temperature: float) -> None:
    if v_teacher != v_student:
        raise UserError(f"the teacher has {v_teacher} tokens and the student {v_student}; they must share a vocabulary")
    if not temperature > 0:
        raise UserError(f"the temperature must be positive, got {temperature}")
