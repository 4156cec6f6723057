"""Gradient descent among orthogonal matrices by Cayley steps, as an optax transformation.

    M  <- beta M - G                                            G = dL/dX, M the momentum
    W^ =  M X^T - 1/2 X (X^T M X^T),    W = W^ - W^^T           skew; W X is the direction along the manifold
    M  <- W X
    a  =  min(rate, 2 q / |W|),   q = 1/2
    Y  <- X + a/2 W (X + Y),   twice, from Y = X + a M          towards X' = (I - a/2 W)^-1 (I + a/2 W) X
    Y  <- Y (3 I - Y^T Y) / 2,   twice: X'                      Newton-Schulz: what the iteration leaves is taken back

Of a direction that is no descent there is none: d/da L(X') at 0 is <G, W X>, and without momentum that is - |W|^2.
The iteration is a contraction as long as a |W| < 2. Leaves are matrices, or stacks of them, each a rotation of its own.

Source: Li, Li and Todorovic, arXiv:2002.01113, algorithm 1 and theorem 1; SpinQuant (Liu et al., arXiv:2405.16406,
section 3.2) takes it for rotations, with rate 1.5 falling to 0 and no momentum. The last line is ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from qjax.errors import UserError
from qjax.typing import Array, Float, Int

_Q = 0.5
_ROUNDS = 2
_TINY = 1e-8


class CayleyState(NamedTuple):
    """Steps taken, and the momentum of each matrix."""

    step: Int[Array, ""]
    momentum: Any


def cayley_sgd(rate: float | optax.Schedule = 1.5, momentum: float = 0.0) -> optax.GradientTransformation:
    """Descent along the manifold of orthogonal matrices.

    Args:
      rate: the longest step l, or a schedule of it.
      momentum: beta.

    Returns: an optax transformation of trees of f32[*b, n, n]; its `update` wants the matrices.

    Raises:
      UserError: a momentum outside of [0, 1); (in `init`) a leaf that is no square matrix.
    """
    if not 0 <= momentum < 1:
        raise UserError(f"cayley_sgd: momentum lies from 0 to below 1, got {momentum}")

    def init(matrices: Any) -> CayleyState:
        for path, X in jax.tree_util.tree_leaves_with_path(matrices):
            if X.ndim < 2 or X.shape[-1] != X.shape[-2]:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(f"{name}: a rotation is a square matrix, and its shape is {list(X.shape)}")
        return CayleyState(jnp.int32(0), jax.tree.map(jnp.zeros_like, matrices))

    def update(grads: Any, state: CayleyState, matrices: Any = None) -> tuple[Any, CayleyState]:
        longest = jnp.float32(rate(state.step) if callable(rate) else rate)
        moved = [
            cayley_step(X, jnp.float32(momentum) * M - G, longest)
            for X, M, G in zip(*map(jax.tree.leaves, (matrices, state.momentum, grads)), strict=True)
        ]
        tree = jax.tree.structure(matrices)
        new, kept = (jax.tree.unflatten(tree, leaves) for leaves in zip(*moved, strict=True))
        return jax.tree.map(jnp.subtract, new, matrices), CayleyState(state.step + 1, kept)

    return optax.GradientTransformation(init, update)


def cayley_step(
    X: Float[Array, "*b n n"], M: Float[Array, "*b n n"], rate: Float[Array, ""] | float
) -> tuple[Float[Array, "*b n n"], Float[Array, "*b n n"]]:
    """One step from X in the direction M: the new X, orthogonal, and M along the manifold at the old one."""
    W = tangent(X, M)
    M = _dot(W, X)
    size = jnp.sqrt(jnp.sum(W * W, axis=(-2, -1), keepdims=True))
    a = jnp.minimum(rate, 2 * _Q / (size + _TINY))
    Y = X + a * M
    for _ in range(_ROUNDS):
        Y = X + 0.5 * a * _dot(W, X + Y)
    return polished(Y), M


def tangent(X: Float[Array, "*b n n"], M: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    """The skew W of a direction M: W X is its part along the manifold at X."""
    Xt = jnp.swapaxes(X, -1, -2)
    W = _dot(M, Xt) - 0.5 * _dot(X, _dot(_dot(Xt, M), Xt))
    return W - jnp.swapaxes(W, -1, -2)


def polished(X: Float[Array, "*b n n"], rounds: int = 2) -> Float[Array, "*b n n"]:
    """The orthogonal matrix next to one that is nearly so; each round squares what is missing."""
    for _ in range(rounds):
        X = 1.5 * X - 0.5 * _dot(X, _dot(jnp.swapaxes(X, -1, -2), X))
    return X


def drift(X: Float[Array, "*b n n"]) -> Float[Array, ""]:
    """The largest entry of X^T X - I."""
    gram = _dot(jnp.swapaxes(X, -1, -2), X)
    return jnp.max(jnp.abs(gram - jnp.broadcast_to(jnp.eye(X.shape[-1], dtype=X.dtype), gram.shape)))


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
