"""Rotation: W' = R_out W R_in^T, x' = R_in x, y = R_out^T y'. Outliers of weights and inputs spread over all channels.

    hadamard     R = H diag(+-1) / sqrt(n)               QuIP#, arXiv:2402.04396, section 3; QuaRot, arXiv:2404.00456
    kronecker    R = (U (x) V) P, U and V orthogonal     QuIP, arXiv:2307.13304, section 4.1
    orthogonal   R dense, Haar                           for small layers and tests

All come from a 32-bit seed, which is what is stored. The dense one is a QR away from it, many times a product with
it: it is made once for a seed whose value is known, and `qjax.tensor.held` keeps it for programs that take packed
weights as arguments. An array that is kept counts as what it is, n^2 floats, so the seed alone stays the default.

H rotates exactly, H' = R_in H R_in^T; E[x^2], E|x| and max|x| do not survive. After a rotation h is flat, so weighting
by it has nothing to exploit: rotate in front of error feedback, not of nearest rounding.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.reparam.hadamard import randomized
from qjax.reparam.orthogonal import dense, turned
from qjax.reparam.orthogonal import kronecker as kronecker_product
from qjax.reparam.orthogonal import orthogonal as dense_matrix
from qjax.reparam.protocol import Applied, Reparam, Site
from qjax.typing import Array, Float

Kind = Literal["hadamard", "kronecker", "orthogonal"]
Side = Literal["in", "out", "both"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("seed", "matrices"),
    meta_fields=("kind", "side", "block", "block_out"),
)
@dataclasses.dataclass(frozen=True)
class Rotated(Applied):
    """A `seed`, u32[], and what is made of it; `matrices`: the dense ones of both sides, where they are held."""

    seed: Any
    kind: Kind = "hadamard"
    side: Side = "both"
    block: int | None = None
    block_out: int | None = None
    matrices: Any = None

    def input(self, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        return self._turn(x, "in", False).astype(x.dtype)

    def output(self, y: Float[Array, "*b out"], x: Float[Array, "*b n"]) -> Float[Array, "*b out"]:
        return self._turn(y, "out", True).astype(y.dtype)

    def forward(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        """R_out w R_in^T."""
        return self._turn(self._turn(w, "in", False).T, "out", False).T

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        return self._turn(self._turn(w, "in", True).T, "out", True).T

    def held(self, out: int, n: int) -> Rotated:
        if self.kind != "orthogonal":
            return self
        sizes = {"in": n, "out": out}
        made = tuple(
            dense_matrix(self.seed, size, salt) if self.side in (side, "both") else None
            for salt, (side, size) in enumerate(sizes.items())
        )
        return dataclasses.replace(self, matrices=made)

    def _turn(self, x: Array, side: Literal["in", "out"], inverse: bool) -> Array:
        if self.side not in (side, "both"):
            return x
        salt = int(side == "out")
        if self.matrices is not None:
            return turned(x, self.matrices[salt], inverse)
        if self.kind == "hadamard":
            block = self.block_out if side == "out" else self.block
            return randomized(x, self.seed, block, inverse, salt)
        return (kronecker_product if self.kind == "kronecker" else dense)(x, self.seed, inverse, salt)


@dataclasses.dataclass(frozen=True)
class Rotate(Reparam):
    """See `hadamard`, `kronecker`, `orthogonal`."""

    kind: Kind = "hadamard"
    side: Side = "both"
    seed: int = 0
    best_of: int = 1
    block: int | None = None
    block_out: int | None = None

    def __post_init__(self) -> None:
        if self.side not in ("in", "out", "both"):
            raise UserError(f"{self.kind}: side is in, out or both, got {self.side!r}")
        if self.best_of < 1:
            raise UserError(f"{self.kind}: best_of must be at least 1, got {self.best_of}")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"H"} if self.best_of > 1 else ())

    def __call__(self, site: Site) -> tuple[Site, Rotated]:
        def under(seed: Array) -> tuple[Site, Rotated]:
            done = Rotated(seed, self.kind, self.side, self.block, self.block_out)
            stats = site.stats if self.side == "out" else site.stats.linear(done.input)
            return site.moved(done.forward(site.w), stats), done

        if self.best_of == 1:
            return under(jnp.uint32(self.seed))
        if site.loss is None:
            raise UserError(f"{self.kind}: best_of={self.best_of} needs roundings to compare the seeds by")

        def loss(seed: Array) -> Array:
            there, _ = under(seed)
            assert site.loss is not None
            return site.loss(there.w, there.stats)

        seeds = jnp.arange(self.seed, self.seed + self.best_of, dtype=jnp.uint32)
        return under(seeds[jnp.argmin(lax.map(loss, seeds))])


def hadamard(
    side: Side = "both", seed: int = 0, best_of: int = 1, block: int | None = None, block_out: int | None = None
) -> Rotate:
    """Randomized Hadamard rotation.

    Args:
      side: of the weight: "in" (n), "out" (rows) or "both".
      seed: of the signs.
      best_of: seeds tried, from `seed` on; the one with the least loss of the recipe's roundings (reparametrizations
        behind this one left out) is kept.
      block: a power of two dividing n: block-diagonal with Hadamards of that size, where n has none of its own.
      block_out: the same for the rows.
    """
    return Rotate("hadamard", side, seed, best_of, block, block_out)


def kronecker(side: Side = "both", seed: int = 0, best_of: int = 1) -> Rotate:
    """Kronecker product of two random orthogonal matrices behind a random permutation: QuIP's incoherence."""
    return Rotate("kronecker", side, seed, best_of)


def orthogonal(side: Side = "both", seed: int = 0, best_of: int = 1) -> Rotate:
    """A dense random orthogonal matrix: n^2 per input."""
    return Rotate("orthogonal", side, seed, best_of)
