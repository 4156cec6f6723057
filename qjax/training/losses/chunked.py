"""Losses over a vocabulary whose logits do not fit: never held for more than a chunk of tokens at a time.

    z = softcap(x . head)       log q_v = z_v - log sum_u exp z_u       u runs over the vocabulary in chunks, by a scan

    chunked_cross_entropy    - mean log q_label
    chunked_loss             T^2 mean sum_v f(log p_v, log q_v), for any divergence f of distill.py

First a scan for the normalizers, then what needs them. All logits are computed again in the backward pass, so that this
too holds n x chunk numbers at a time; what it costs is a product with the head more for each scan. The same numbers as
distill.py's and optax's up to the order of sums.

Source: the running maximum and sum are those of online softmax, Milakov & Gimelshein, arXiv:1805.02867, section 3.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.models.attention import softcapped
from qjax.training.losses.distill import FLOOR, Divergence, check_alike, token_mean
from qjax.typing import Array, Float, Int, Shaped

_remat = partial(jax.checkpoint, prevent_cse=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Unread:
    """Logits x . head that are never held all at once.

    Attributes:
      x: floats [n, d]; what the head reads, of n tokens. Products are of this type and accumulate in float32.
      head: floats [d, v].
      chunk: tokens of the vocabulary at a time; v need not be a multiple.
      softcap: c of logits c tanh(z / c); None: z.

    Raises:
      UserError: a chunk below 1.
    """

    x: Float[Array, "n d"]
    head: Float[Array, "d v"]
    chunk: int
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UserError(f"a chunk must hold at least 1 token of the vocabulary, got {self.chunk}")


def chunked_cross_entropy(
    logits: Unread, targets: Int[Array, "n"], mask: Shaped[Array, "n"] | None = None
) -> Float[Array, ""]:
    """Mean negative log-likelihood, nats per token.

    Args:
      logits: of n tokens.
      targets: ints [n], the next tokens.
      mask: as in `distill_loss`.
    """
    x, head = logits.x, logits.head
    read = _Reader(x.astype(jnp.float32), x.dtype, head.shape[1], logits.chunk, logits.softcap)
    top, log_mass = _normalizers([read], (read.columns(head),))[0]
    own = head.astype(x.dtype)[:, targets]  # [d, n]
    z = jnp.sum(x.astype(jnp.float32) * own.T.astype(jnp.float32), axis=1, keepdims=True)
    return token_mean((top + log_mass - softcapped(z, logits.softcap))[:, 0], mask)


def chunked_loss(
    divergence: Divergence,
    teacher: Unread,
    student: Unread,
    mask: Shaped[Array, "n"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """`distill_loss` of a teacher's and a student's logits, in the student's chunks.

    Args:
      divergence: from `distill.divergence(name)`.
      teacher, student: of the same n tokens.
      mask, temperature: as in `distill_loss`.

    Returns: f32 scalar.

    Raises:
      UserError: as `distill_loss`.
    """
    v, both = teacher.head.shape[1], (teacher, student)
    check_alike(v, student.head.shape[1], temperature)
    x_teacher, head_teacher = lax.stop_gradient((teacher.x, teacher.head))
    each_x, heads = (x_teacher, student.x), (head_teacher, student.head)
    readers = [
        _Reader(x.astype(jnp.float32), x.dtype, v, student.chunk, logits.softcap, temperature)
        for x, logits in zip(each_x, both, strict=True)
    ]
    parts = tuple(r.columns(head) for r, head in zip(readers, heads, strict=True))
    normalizers = _normalizers(readers, parts)

    @_remat
    def add_terms(total: Array, part: Any) -> tuple[Array, None]:
        real, heads = part
        each = zip(readers, heads, normalizers, strict=True)
        log_p, log_q = (jnp.maximum(r.logits(head, real) - top - mass, FLOOR) for r, head, (top, mass) in each)
        return total + divergence(log_p, log_q).sum(axis=1), None

    total, _ = lax.scan(add_terms, jnp.zeros(student.x.shape[0]), (readers[0].real(), parts))
    return temperature**2 * token_mean(total, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """The logits of some tokens, a chunk of the vocabulary at a time."""

    x: Array  # f32[n, d]: its gradient is a sum over chunks, held in float32, whatever the type of the products
    dtype: Any  # of the products
    v: int
    chunk: int
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def count(self) -> int:
        """Chunks."""
        return -(-self.v // self.chunk)

    def columns(self, head: Array) -> Array:
        """The head's columns in chunks, the last one padded: [d, v] -> [count, d, chunk]."""
        padded = jnp.pad(head, ((0, 0), (0, self.count * self.chunk - self.v)))
        return padded.reshape(head.shape[0], self.count, self.chunk).swapaxes(0, 1)

    def real(self) -> Array:
        """Which columns are no padding: [count, 1, chunk]."""
        return jnp.arange(self.count * self.chunk).reshape(self.count, 1, self.chunk) < self.v

    def logits(self, head: Array, real: Array) -> Array:
        """Of one chunk, f32[n, chunk]."""
        x, head = self.x.astype(self.dtype), head.astype(self.dtype)
        z = jnp.matmul(x, head, precision="highest", preferred_element_type=jnp.float32)
        return jnp.where(real, softcapped(z, self.softcap) / self.temperature, FLOOR)


def _normalizers(readers: list[_Reader], parts: tuple[Array, ...]) -> list[tuple[Array, Array]]:
    """Of each reader log sum_v exp z_v, as its maximum and the log of the rest, [n, 1] each."""

    @_remat
    def add(carry: Any, part: Any) -> tuple[Any, None]:
        real, heads = part
        each = zip(readers, heads, carry, strict=True)
        return [_added(top, mass, r.logits(head, real)) for r, head, (top, mass) in each], None

    empty = [(jnp.full((len(r.x), 1), FLOOR), jnp.zeros((len(r.x), 1))) for r in readers]
    sums, _ = lax.scan(add, empty, (readers[0].real(), parts))
    return [(top, jnp.log(mass)) for top, mass in sums]


def _added(top: Array, mass: Array, z: Array) -> tuple[Array, Array]:
    """More logits [n, chunk] into a normalizer exp(top) x mass, [n, 1] each."""
    new = jnp.maximum(top, lax.stop_gradient(z).max(axis=1, keepdims=True))
    return new, mass * jnp.exp(top - new) + jnp.exp(z - new).sum(axis=1, keepdims=True)
