"""Weights and second moments to round, and losses in float64."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.rounding.curvature import cholesky, feedback
from qjax.rounding.protocol import DAMPING, State
from qjax.stats import Stats


def second_moment(n: int, seed: int = 0, tokens: int | None = None) -> np.ndarray:
    """E[x x^T] of correlated inputs with a decaying spectrum and channels of very different size, f32[n, n]."""
    rng = np.random.default_rng(1000 + seed)
    tokens = tokens or 4 * n
    mix = np.linalg.qr(rng.standard_normal((n, n)))[0] * np.arange(1, n + 1) ** -0.5
    x = rng.standard_normal((tokens, n)) @ mix.T * rng.lognormal(0, 0.7, n)
    return (x.T @ x / tokens).astype(np.float32)


@cache
def problem(rows: int, n: int, seed: int = 0) -> tuple[jnp.ndarray, jnp.ndarray]:
    """(w, H)."""
    w = np.random.default_rng(seed).standard_normal((rows, n))
    return jnp.asarray(w, jnp.float32), jnp.asarray(second_moment(n, seed))


def with_eigenvalue(n: int, value: float, seed: int = 0) -> np.ndarray:
    """A symmetric matrix with unit diagonal whose smallest eigenvalue is exactly the one given (it may be negative)."""
    x = np.random.default_rng(seed).standard_normal((2 * n, n))
    r = x.T @ x
    r /= np.sqrt(np.outer(np.diag(r), np.diag(r)))
    least = np.linalg.eigvalsh(r)[0]
    return (np.eye(n) + (r - np.eye(n)) * (1 - value) / (1 - least)).astype(np.float32)


def float64(*arrays) -> list[np.ndarray]:
    return [np.asarray(a, np.float64) for a in arrays]


def damped64(H, damping: float) -> np.ndarray:
    """H + lambda diag(H)."""
    H = np.asarray(H, np.float64)
    return H + damping * np.diag(np.diag(H))


def factor(H, damping: float, tile: int = 1):
    """The feedback L - 1 of H + lambda diag(H) = L D L^T, D in tiles, and the lambda used."""
    c, used = cholesky(H, damping)
    return feedback(c, tile), used


def losses(w, w_hat, H) -> np.ndarray:
    """e H e^T of each row."""
    w, w_hat, H = float64(w, w_hat, H)
    e = w - w_hat
    return np.einsum("...i,ij,...j->...", e, H, e)


def staged(w, H, fmt, *stages):
    """The states behind each of the stages, from one program."""

    @jax.jit
    def run(w, H):
        states = [State(None, None, w, jnp.float32(DAMPING))]
        for stage in stages:
            states.append(stage(states[-1], fmt, Stats(H=H)))
        return states[1:]

    return run(w, H)


def marked(cases, fast):
    """All cases as parameters of a test, marked slow unless among the fast ones: each is a compilation of its own."""
    missing = [case for case in fast if case not in cases]
    assert not missing, missing
    slow = pytest.mark.slow
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=() if c in fast else slow) for c in cases]
