"""Codebooks that a matrix shares, by least squares in the metric that counts, and codes by descent, in turns.

    minimize over C   tr((W - A C) H (W - A C)^T)        A C = decode(codes, C), linear in the entries
    A^T (A C H) = A^T (W H)                              by conjugate gradients, preconditioned by diag(A^T A h)

An entry is met all over the matrix, so the normal equations are dense: 4096 unknowns at 2x8. Each step of conjugate
gradients costs one product with H, and none makes the loss larger. Then a pass of descent over the codes (descend.py),
each tile by beam search in its own metric. Books are judged as they are stored, and the better state is kept.

Source: AQLM, arXiv:2401.06118, section 3.2, whose update of codebooks is Adam on the same loss.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Format, Shared
from qjax.rounding.descend import Descend, keep_better, losses
from qjax.rounding.protocol import Rounding, State, errors_of, metric
from qjax.stats import Stats
from qjax.typing import Array, Float

_SOLVED = 1e-8  # of the first residual's square: what is left is rounding, and no direction to go on in


@dataclasses.dataclass(frozen=True)
class Codebooks(Rounding):
    """See `codebooks`."""

    rounds: int = 4
    steps: int = 16

    def __post_init__(self) -> None:
        if min(self.rounds, self.steps) < 1:
            raise UserError(f"codebooks: rounds and steps must be at least 1, got {self}")

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"})

    def check(self, format: Format) -> None:
        """Raise UserError where a matrix shares no levels."""
        if not isinstance(format, Shared):
            raise UserError(f"codebooks: {format.name} has no codebook to solve for; take one such as aqlm_2x8_g8")

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        assert isinstance(format, Shared)
        H = metric(state, stats)

        def one_round(_: Array, now: tuple[State, Array]) -> tuple[State, Array]:
            state, loss = keep_better(now[0], solved(now[0], format, H, self.steps), format, now[1], H)
            return keep_better(state, Descend(1).swept(state, format, H), format, loss, H)

        return lax.fori_loop(0, self.rounds, one_round, (state, losses(state, format, H)))[0]


def codebooks(rounds: int = 4, steps: int = 16) -> Codebooks:
    """AQLM: books of a matrix by least squares in the metric of H, codes by beam search, in turns; never a larger loss.

    Args:
      rounds: turns.
      steps: of conjugate gradients in each.
    """
    return Codebooks(rounds, steps)


def solved(state: State, format: Shared, H: Float[Array, "n n"], steps: int) -> State:
    """The state with its books moved toward the least squares for its codes, as they are stored."""
    scales, codes = state.scales, state.codes
    assert scales is not None and codes is not None
    key, start = format.shared, scales[format.shared]
    s = format.columns(scales, state.target.shape)[0]

    def made(books: Array) -> Array:
        w_hat = format.decode(scales | {key: books}, codes)
        return w_hat if state.outliers is None else jnp.where(state.outliers[0], 0.0, w_hat)

    _, back = jax.vjp(made, start)

    def gathered(e: Array) -> Array:
        """A^T (e H)."""
        return back(_dot(e, H))[0]

    (size,) = back(jnp.abs(s) * jnp.diagonal(H)[None, :])  # s^2 h of all that an entry stands for
    inverse = jnp.where(size > 0, 1.0 / jnp.where(size > 0, size, 1.0), 0.0)

    def step(_: Array, now: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        x, r, p, rz = now
        Ap = gathered(made(p))
        power = jnp.sum(p * Ap)
        going = (power > 0) & (rz > _SOLVED * first)
        a = jnp.where(going, rz / jnp.where(going, power, 1.0), 0.0)
        x, r = x + a * p, r - a * Ap
        z = inverse * r
        new = jnp.sum(r * z)
        return x, r, z + jnp.where(rz > 0, new / jnp.where(rz > 0, rz, 1.0), 0.0) * p, new

    r = gathered(errors_of(state, format))
    z = inverse * r
    first = jnp.sum(r * z)
    books, *_ = lax.fori_loop(0, steps, step, (start, r, z, first))
    return dataclasses.replace(state, scales=format.with_shared(scales, books))


def _dot(a: Array, b: Array) -> Array:
    return lax.dot(a, b, precision=lax.Precision.HIGHEST)
