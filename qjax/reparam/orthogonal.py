"""Random orthogonal transforms: dense, and QuIP's product of two small ones behind a permutation.

    dense         x -> x Q^T,                    Q Haar-random: Q R = G, G_ij normal, the signs of diag(R) moved into Q
    kronecker     x -> x[order] (U (x) V)^T,     n = p q, p and q as near as can be: (p + q) multiplications an entry

Sources: QuIP, arXiv:2307.13304, section 4.1; the signs: Mezzadri, arXiv:math-ph/0609050, section 5.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.typing import Array, Float, Integer


def orthogonal(seed: Integer[Array, ""] | int, n: int, salt: Integer[Array, ""] | int = 0) -> Float[Array, "n n"]:
    """A Haar-random orthogonal matrix, f32[n, n]: the same for the same seed and salt, and then made only once.

    Where a program takes the seed as an argument, its value is not known when the program is made, and every run makes
    the matrix.
    """
    if n < 1:
        raise UserError(f"orthogonal: n must be at least 1, got {n}")
    if isinstance(seed, jax.core.Tracer) or isinstance(salt, jax.core.Tracer):
        return _haar(_key(seed, salt), n)
    return _made(int(seed), int(salt), n)


@lru_cache(maxsize=8)
def _made(seed: int, salt: int, n: int) -> Array:
    with jax.ensure_compile_time_eval():
        return _haar(_key(seed, salt), n)


def dense(
    x: Float[Array, "*b n"],
    seed: Integer[Array, ""] | int,
    inverse: bool = False,
    salt: Integer[Array, ""] | int = 0,
) -> Float[Array, "*b n"]:
    """x Q^T along the last axis, Q = orthogonal(seed, n, salt).

    Args:
      x: floating, any leading axes; halves are computed in float32 and given back as they came.
      seed, salt: what Q comes from; the salt tells uses of one seed apart.
      inverse: x Q, which undoes it.
    """
    return turned(x, orthogonal(seed, _width("dense", x), salt), inverse)


def turned(x: Float[Array, "*b n"], Q: Float[Array, "n n"], inverse: bool = False) -> Float[Array, "*b n"]:
    """x Q^T along the last axis, or x Q, in x's type."""
    return _product(x, Q if inverse else Q.T).astype(x.dtype)


def kronecker(
    x: Float[Array, "*b n"],
    seed: Integer[Array, ""] | int,
    inverse: bool = False,
    salt: Integer[Array, ""] | int = 0,
) -> Float[Array, "*b n"]:
    """x[order] (U (x) V)^T along the last axis, U of p x p, V of q x q and a random order of the n = p q entries.

    Args:
      x: floating, any leading axes; halves are computed in float32 and given back as they came.
      seed, salt: what U, V and the order come from; the salt tells uses of one seed apart.
      inverse: undoes it.

    Raises:
      UserError: n is a prime.
    """
    n = _width("kronecker", x)
    p = next(p for p in range(math.isqrt(n), 0, -1) if n % p == 0)
    if p == 1 < n:
        raise UserError(
            f"kronecker: n = {n} is a prime and no product of two sizes; use hadamard with block=, or dense"
        )
    left, right, shuffle = jax.random.split(_key(seed, salt), 3)
    return _kronecker(x, _haar(left, p), _haar(right, n // p), _shuffled(shuffle, n), inverse)


@partial(jax.jit, static_argnames="inverse")
def _kronecker(x: Array, U: Array, V: Array, order: Array, inverse: bool) -> Array:
    y = x if inverse else jnp.take(x, order, axis=-1)
    y = y.reshape(*x.shape[:-1], U.shape[0], V.shape[0])
    y = _product(y, V if inverse else V.T)
    y = jnp.swapaxes(_product(jnp.swapaxes(y, -1, -2), U if inverse else U.T), -1, -2)
    y = y.reshape(x.shape).astype(x.dtype)
    return jnp.take(y, jnp.argsort(order), axis=-1) if inverse else y


@partial(jax.jit, static_argnames="n")
def _shuffled(key: Array, n: int) -> Array:
    return jnp.argsort(jax.random.bits(key, (n,), jnp.uint32))


def _key(seed: Array | int, salt: Array | int) -> Array:
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), salt)


@partial(jax.jit, static_argnames="n")
def _haar(key: Array, n: int) -> Array:
    Q, R = jnp.linalg.qr(jax.random.normal(key, (n, n), jnp.float32))
    # QR alone favours some matrices: Householder's signs are no chance.
    return Q * jnp.where(jnp.diagonal(R) < 0, jnp.float32(-1), jnp.float32(1))[None, :]


def _width(name: str, x: Array) -> int:
    if x.ndim == 0 or x.shape[-1] == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{name}: x must be floating with a last axis to rotate, got {x.dtype}{list(x.shape)}")
    return int(x.shape[-1])


def _product(x: Array, Q: Array) -> Array:
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x.astype(wide), Q.astype(wide), contracted, precision=lax.Precision.HIGHEST)
