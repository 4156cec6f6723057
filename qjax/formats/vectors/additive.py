"""AQLM's additive codes: eight weights are a sum of entries, one of each codebook, which all rows of a matrix share.

    w_hat = s sum_m C_m[c_m]        aqlm_2x8_g8: two books of 2^8 entries, eight weights each

Books are learned with the scales (vector_kmeans.py), s = rms of the row, then by least squares in the metric of H
(rounding/codebooks.py). They are the matrix's and not the row's, so they are no columns of the grid: `bound` puts them
into it, and what it returns has the `round` and the `basis` that the format alone cannot have.

Leaves, for weights [*b, n], n a multiple of 8; a matrix is the last two axes:

    codes   u8[*b, 1, n M B / 64]        a bit stream a row; the M codes of eight weights side by side
    scale   f16[*b, 1]
    books   f16[*b[:-1], 1, M 2^B 8]     M 2^(B + 7) bits, which `bits_per_weight` leaves out: a whole bit a weight in a
                                         matrix of 256 x 256 at 2x8, 1/16 in one of 1024 x 1024

Source: AQLM, arXiv:2401.06118; a scale a row, groups of eight of a row. Its tuning is training/tuning's, of any format.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from qjax.chain import Link
from qjax.errors import UserError
from qjax.formats.bits import pack_bits, unpack_bits
from qjax.formats.protocol import Columns, Leaves, Scales, Tile
from qjax.formats.storage import over, stored
from qjax.formats.tiles import round_tiles
from qjax.formats.vectors.vector_kmeans import additive_kmeans, nearest_sums, summed
from qjax.typing import Array, Float, Integer, UInt8

K = 8
"""Weights of an entry."""

BEAM = 8


@dataclasses.dataclass(frozen=True)
class Additive(Link):
    """See the module's docstring.

    Attributes:
      books: M.
      bits: B, of a code.
    """

    books: int
    bits: int

    @property
    def name(self) -> str:
        return f"aqlm_{self.books}x{self.bits}_g{K}"

    @property
    def about(self) -> str:
        """A line for `qjax formats`."""
        return f"AQLM: sums of {self.books} of 2^{self.bits} learned entries of {K} weights, a book a matrix"

    @property
    def block(self) -> int:
        return 0

    @property
    def tile(self) -> Tile:
        return 1, K

    @property
    def rows(self) -> int:
        return 0

    @property
    def bits_per_weight(self) -> float:
        return self.books * self.bits / K

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        if w.ndim == 1:
            return jax.tree.map(lambda a: a[0], self.fit(w[None], None if weight is None else weight[None]))
        if w.ndim > 2:
            return jax.vmap(self.fit)(w, weight) if weight is not None else jax.vmap(self.fit)(w)
        s = stored(jnp.sqrt(jnp.sum(jnp.square(w), axis=-1, keepdims=True) * (1.0 / w.shape[-1])), "f16")
        v = jnp.square(s) * (jnp.ones_like(w) if weight is None else weight)
        books = additive_kmeans(_vectors(over(w, s)), _vectors(over(v, jnp.max(v))), self.books, 2**self.bits, BEAM)
        return {"scale": s, "books": stored(books.reshape(1, -1), "f16")}

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> UInt8[Array, "*b m"]:
        if w.ndim == 1:
            return self.nearest(jax.tree.map(lambda a: a[None], scales), w[None])[0]
        if w.ndim > 2:
            return jax.vmap(self.nearest)(scales, w)
        return round_tiles(self.bound(scales), self.columns(scales, w.shape), w)[1]

    def decode(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Float[Array, "*b n"]:
        if codes.ndim == 1:
            return self.decode(jax.tree.map(lambda a: a[None], scales), codes[None])[0]
        if codes.ndim > 2:
            return jax.vmap(self.decode)(scales, codes)
        return scales["scale"] * self.bound(scales).basis(codes)[0]

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, UInt8[Array, "*b m"]]:
        """The sums near in the metric of `weight`, which single levels do not depend on and vectors do."""
        if w.ndim == 1:
            made = self.encode(w[None], None if weight is None else weight[None])
            return jax.tree.map(lambda a: a[0], made)
        scales = self.fit(w, weight)
        if weight is None:
            return scales, self.nearest(scales, w)

        def one(scales: Scales, w: Array, weight: Array) -> Array:
            C, u = self.bound(scales).C, over(w, scales["scale"])
            return nearest_sums(C, _vectors(u), BEAM, _vectors(weight)).reshape(w.shape[0], -1)

        return scales, (one if w.ndim == 2 else jax.vmap(one))(scales, w, weight)

    @property
    def shared(self) -> str:
        return "books"

    def with_shared(self, scales: Scales, levels: Array) -> Scales:
        return scales | {"books": stored(levels, "f16")}

    def bound(self, scales: Scales) -> Bound:
        """See `Shared`."""
        return Bound(scales["books"].reshape(self.books, 2**self.bits, K))

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> Columns:
        return scales["scale"], None

    def round(self, columns: Columns, target: Array, metric: Array | None = None) -> tuple[Array, Array]:
        raise TypeError(f"{self.name}: its books are the matrix's; round on bound(scales)")

    def basis(self, codes: Array) -> tuple[Array, ...]:
        raise TypeError(f"{self.name}: its books are the matrix's; ask bound(scales) for the basis")

    def store(self, scales: Scales, columns: Columns) -> Scales:
        return scales | {"scale": stored(columns[0], "f16")}

    def pack(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Leaves:
        halves = {k: scales[k].astype(jnp.float16) for k in ("scale", "books")}
        return {"codes": pack_bits(codes[..., None, :], self.bits), **halves}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b m"]]:
        scales = {k: leaves[k].astype(jnp.float32) for k in ("scale", "books")}
        return scales, unpack_bits(leaves["codes"], self.bits)[..., 0, :]

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, _, size = leaves["codes"].shape
        return (*lead, size * 8 // self.bits // self.books * K)


def _vectors(w: Float[Array, "*b n"]) -> Float[Array, "t k"]:
    return w.reshape(-1, K)


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """The grid of one matrix. No static argument, for it holds arrays.

    Attributes:
      C: the books, f32[M, 2^B, 8].
    """

    C: Any

    @property
    def tile(self) -> Tile:
        return 1, K

    def round(
        self, columns: Columns, target: Float[Array, "*c 1 k"], metric: Float[Array, "k k"] | None = None
    ) -> tuple[Float[Array, "*c 1 k"], UInt8[Array, "*c 1 m"]]:
        s = columns[0][..., None]
        u = over(target, s).reshape(-1, K)
        codes = nearest_sums(self.C, jnp.where(jnp.isfinite(u), u, 0.0), BEAM, metric=metric)
        return s * summed(self.C, codes).reshape(target.shape), codes.reshape(*target.shape[:-1], -1)

    def basis(self, codes: Integer[Array, "*b m"]) -> tuple[Array, ...]:
        tiles = codes.reshape(*codes.shape[:-1], -1, self.C.shape[0])
        return (summed(self.C, tiles).reshape(*codes.shape[:-1], -1),)


def additive(books: int = 2, bits: int = 8) -> Additive:
    """AQLM's codes of `books` times `bits` bits for eight weights.

    Raises:
      UserError: books other than 1 to 4, bits other than 2 to 8.
    """
    if books not in (1, 2, 3, 4) or not 2 <= bits <= 8:
        raise UserError(f"aqlm has 1 to 4 books of 2 to 8 bits, as in aqlm_2x8_g8; got {books} of {bits}")
    return Additive(books, bits)


def parse(name: str) -> Additive | None:
    """aqlm_MxB_g8, as in "aqlm_1x8_g8"; None for other names.

    >>> parse("aqlm_1x8_g8").bits_per_weight
    1.0
    """
    found = re.fullmatch(rf"aqlm_(\d+)x(\d+)_g{K}", name)
    return found and additive(int(found[1]), int(found[2]))


FORMATS = (additive(2, 8),)
