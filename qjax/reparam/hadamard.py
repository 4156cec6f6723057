"""Hadamard matrices and the fast orthonormal transform with random signs.

    H H^T = n I,  H_ij = +-1          x -> x H^T / sqrt(n)          x -> (x s) H^T / sqrt(n),  s_i = +-1 by chance

Whatever x was, the entries of a randomized transform are about normal: no weight stands out, none is an outlier.

Orders: Sylvester's doubling; Paley I, q + 1 for a prime power q = 3 mod 4; Paley II, 2 (q + 1) for q = 1 mod 4; for the
orders 4 m below 256 that remain, four circulants A B C D in the array of Goethals and Seidel (1967),
A A^T + B B^T + C C^T + D D^T = 4 m I; Kronecker products of all these. Every matrix is checked before it is handed out.

Sources: QuIP#, arXiv:2402.04396, section 3 (the randomized transform and its bounds); Williamson 1944; Turyn 1974.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import UserError
from qjax.typing import Array, Float, Integer

LARGEST = 4096
"""Orders above this are only applied in factors, never written out."""

_FOUR = {
    23: (0x6542A6, 0x6A0056, 0x1CC338, 0x6C7E36),
    29: (0x19E805E6, 0x1BAC0D76, 0xCA1E14C, 0x111A1622),
    39: (0x7749E792EE, 0x4FCD42B3F2, 0x3165FFA68C, 0x761EA5786E),
    43: (0x1CD53FCAB38, 0x4F4C932F20, 0x4F85108A1F2, 0x285B198DA14),
    47: (0x675762D8013A, 0x52C31D27013A, 0x18A8E2D8013A, 0x2D3C9D27013A),
    59: (0x6B8769012066570, 0x412DC3AADF99A8E, 0x147896FD2066570, 0x3ED23C56DF99A8E),
}
"""First rows of the four circulants, bit i set where entry i is -1. Up to 43 they are symmetric (Williamson), found by
matching autocorrelations of pairs, at 39 and 43 only among rows that a multiplier of order 3 leaves alone or turns into
one another; 47 and 59 come from Turyn-type sequences of length 16 and Turyn sequences of length 15, found likewise."""

_TILE = 2**19
"""Entries that go through all products before the next ones: they stay in the cache."""


@lru_cache(maxsize=64)
def hadamard_matrix(n: int) -> np.ndarray:
    """A Hadamard matrix, H H^T = n I.

    Returns: int8[n, n] of +-1, read-only; of a power of two it is Sylvester's, which is symmetric.

    Raises:
      UserError: no construction here reaches this order, or it is above LARGEST.
    """
    how = _construction(n)
    if how is None:
        raise UserError(f"{_unknown(n)}; {_blocks(n)}")
    if n > LARGEST:
        raise UserError(f"a Hadamard matrix of order {n} is not written out, {LARGEST} is the most: use hadamard()")
    H = _built(n, *how).astype(np.int8)
    wide = H.astype(np.float32)  # whose products of +-1 are exact
    if not (np.all(np.abs(H) == 1) and np.array_equal(wide @ wide.T, n * np.eye(n, dtype=np.float32))):
        raise AssertionError(f"the {how[0]} construction of order {n} is no Hadamard matrix")
    H.flags.writeable = False
    return H


@cache
def _construction(n: int) -> tuple[str, int] | None:
    """What builds order n, and the q, the m or the left factor it builds with; None: nothing here does."""
    if n < 1 or (n > 2 and n % 4):
        return None
    if n & (n - 1) == 0:
        return "sylvester", n.bit_length() - 1
    if (n - 1) % 4 == 3 and _prime_power(n - 1):
        return "paley1", n - 1
    if (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1):
        return "paley2", n // 2 - 1
    if n // 4 in _FOUR:
        return "four", n // 4
    for a in range(2, math.isqrt(n) + 1, 2):
        if n % a == 0 and _construction(a) and _construction(n // a):
            return "kronecker", a
    return None


def _built(n: int, how: str, by: int) -> np.ndarray:
    two = np.array([[1, 1], [1, -1]], np.int8)
    if how == "sylvester":
        H = np.ones((1, 1), np.int8)
        for _ in range(by):
            H = np.kron(two, H)
        return H
    if how == "kronecker":
        return np.kron(hadamard_matrix(by), hadamard_matrix(n // by))
    if how == "four":
        return _goethals_seidel(by, _FOUR[by])
    bordered = np.ones((by + 1, by + 1), np.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _residues(by)
    if how == "paley1":
        bordered[1:, 0] = -1  # skew, as the residues are
        return bordered + np.eye(n, dtype=np.int8)
    return np.kron(bordered, two) + np.kron(np.eye(by + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8))


def _goethals_seidel(m: int, rows: tuple[int, ...]) -> np.ndarray:
    at = np.arange(m)
    bits = np.array([[row >> i & 1 for i in range(m)] for row in rows])
    A, B, C, D = (1 - 2 * bits)[:, (at[None, :] - at[:, None]) % m]
    b, c, d = B[:, ::-1], C[:, ::-1], D[:, ::-1]  # times the back-diagonal
    bt, ct, dt = B.T[:, ::-1], C.T[:, ::-1], D.T[:, ::-1]
    return np.block([[A, b, c, d], [-b, A, dt, -ct], [-c, -dt, A, bt], [-d, ct, -bt, A]])


@cache
def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p prime."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


def _residues(q: int) -> np.ndarray:
    """int8[q, q]: whether the difference of two elements of GF(q) is a square, 1, or not, -1; 0 on the diagonal."""
    power = _prime_power(q)
    assert power is not None
    p, k = power
    place = p ** np.arange(k)
    character = np.zeros(q, np.int8)
    character[np.array(_powers(p, k)) @ place] = np.where(np.arange(q - 1) % 2 == 0, 1, -1)
    elements = np.arange(q)[:, None] // place % p  # polynomials, by their coefficients
    return np.stack([character[(e - elements) % p @ place] for e in elements])


def _powers(p: int, k: int) -> list[tuple[int, ...]]:
    """1, x, x^2, ..., x^(q - 2) in GF(p)[x] modulo the first polynomial of degree k that makes them all differ."""
    one = (1,) + (0,) * (k - 1)
    for tail in product(range(p), repeat=k):  # x^k = tail
        if tail[0] == 0:
            continue
        powers, e = [one], one
        while True:
            e = tuple((low + e[-1] * t) % p for low, t in zip((0, *e[:-1]), tail, strict=True))
            if e == one:
                break
            powers.append(e)
        if len(powers) == p**k - 1:
            return powers
    raise AssertionError(f"{p} is no prime")


def largest_block(n: int) -> int:
    """The largest power of two that divides n."""
    if n < 1:
        raise UserError(f"a Hadamard transform needs a positive size, got {n}")
    return n & -n


def factors(n: int, block: int | None = None) -> tuple[int, int]:
    """How the transform of n is made: (2^k, m) of H_{2^k} (x) H_m, n = 2^k m, m as small as there is a matrix for.

    Args:
      n: the size.
      block: a power of two that divides n: block-diagonal, n / block times H_block.

    Returns: (2^k, m), m being 1 or a multiple of 4; (block, 1) with a block.

    Raises:
      UserError: no such m, or the block does not fit.
    """
    two = largest_block(n)
    if block is not None:
        if block < 1 or block & (block - 1) or n % block:
            raise UserError(f"block = {block} is no power of two that divides {n}; the largest is {two}")
        return block, 1
    odd = n // two
    for m in (odd << j for j in range(two.bit_length()) if odd << j <= LARGEST):
        if _construction(m):
            return n // m, m
    raise UserError(f"{_unknown(n)}; {_blocks(n)}")


def _unknown(n: int) -> str:
    return f"no construction here gives a Hadamard matrix of order {n}"


def _blocks(n: int) -> str:
    return f"block-diagonal ones always work: block={largest_block(n)} is the largest power of two that divides {n}"


def hadamard(x: Float[Array, "*b n"], block: int | None = None, inverse: bool = False) -> Float[Array, "*b n"]:
    """x H^T / sqrt(n) along the last axis, H = H_{2^k} (x) H_m of `factors`, or block-diagonal.

    Float32 in full precision (float64 stays; halves are computed in float32 and given back as they came).

    Args:
      x: any leading axes.
      block: see `factors`.
      inverse: x H / sqrt(n), which undoes it.

    Raises:
      UserError: n has no such H, the block does not fit, or x is not floating.
    """
    return _transform(_checked(x, block), None, block, inverse)


def signs(seed: Integer[Array, ""] | int, n: int, salt: Integer[Array, ""] | int = 0) -> Float[Array, "n"]:
    """+-1 by chance, f32[n]: the same for the same seed and salt wherever it runs (threefry)."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), salt)
    return jnp.where(jax.random.bits(key, (n,), jnp.uint32) >> 31 == 0, jnp.float32(1), jnp.float32(-1))


def randomized(
    x: Float[Array, "*b n"],
    seed: Integer[Array, ""] | int,
    block: int | None = None,
    inverse: bool = False,
    salt: Integer[Array, ""] | int = 0,
) -> Float[Array, "*b n"]:
    """(x s) H^T / sqrt(n), s = signs(seed, n, salt); its inverse is (x H / sqrt(n)) s.

    Args:
      x, block, inverse: see `hadamard`.
      seed, salt: what the signs come from; the salt tells uses of one seed apart.
    """
    x = _checked(x, block)
    return _transform(x, signs(seed, x.shape[-1], salt), block, inverse)


def _checked(x: Array, block: int | None) -> Array:
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"hadamard: x must be floating with at least one axis, got {x.dtype}{list(x.shape)}")
    factors(x.shape[-1], block)
    return x


@partial(jax.jit, static_argnames=("block", "inverse"))
def _transform(x: Array, s: Array | None, block: int | None, inverse: bool) -> Array:
    n = x.shape[-1]
    two, m = factors(n, block)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    *left, last = _parts(two, m)
    parts = [*(jnp.asarray(h, wide) for h in left), jnp.asarray(last / math.sqrt(two * m), wide)]
    dims = tuple(h.shape[0] for h in parts)

    def rows(x: Array) -> Array:
        y = x.astype(wide)
        if s is not None and not inverse:
            y = y * s.astype(wide)[None, :]
        y = y.reshape(x.shape[0] * (n // (two * m)), *dims)
        for h in parts:  # the axis done goes to the end: after the last one all are where they were
            contracted = (((1,), (0 if inverse else 1,)), ((), ()))
            y = lax.dot_general(y, h, contracted, precision=lax.Precision.HIGHEST)
        y = y.reshape(x.shape)
        if s is not None and inverse:
            y = y * s.astype(wide)[None, :]
        return y.astype(x.dtype)

    flat = x.reshape(math.prod(x.shape[:-1]), n)
    tile = _tile(*flat.shape)

    def tiled(x: Array) -> Array:
        return lax.map(rows, x.reshape(-1, tile, n)).reshape(x.shape)

    if not tile:
        return rows(flat).reshape(x.shape)
    return lax.platform_dependent(flat, cpu=tiled, default=rows).reshape(x.shape)


def _tile(rows: int, n: int) -> int:
    """Rows at a time: a power of two that divides them; 0: all of them, where they are few or do not divide."""
    tile = math.gcd(rows, 1 << max(1, _TILE // n).bit_length() - 1)
    return tile if tile < rows and 8 * tile * n >= _TILE else 0


@lru_cache(maxsize=64)
def _parts(two: int, m: int) -> tuple[np.ndarray, ...]:
    """H_{2^k} (x) H_m as the Kronecker factors that are fastest to multiply with, m's with the last."""
    k = two.bit_length() - 1
    splits: list[tuple[int, ...]] = [(two * m,)]
    splits += [(1 << i, m << k - i) for i in range(1, k + 1)]
    splits += [(1 << i, 1 << j, m << k - i - j) for i in range(1, k) for j in range(1, k - i + 1)]
    *left, last = min(splits, key=_cost)
    return *(hadamard_matrix(d) for d in left), np.kron(hadamard_matrix(last // m), hadamard_matrix(m))


def _cost(dims: tuple[int, ...]) -> int:
    """Measured on a CPU: a pass over the entries costs as much as 160 multiplications, below 32 none is saved."""
    return sum(max(d, 32) + 160 for d in dims)
