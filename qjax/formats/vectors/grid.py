"""The format of vector codes: points of whole tiles times a scale of each row.

    w_hat = s p        (p, code) = nearest point to the tile's w / s        VectorGrid("E8P_2", E8P())

A code's bytes are what is stored; scales are f16, one a row, in closed form before the search, and after it again:

    s = c rms(w),  c the code's best for normal weights        s <- sum v w p / sum v p^2

Leaves, for weights [*b, n] in tiles of r x k with K bits a weight (`bits_per_weight`, without the scales' 16 / n):

    codes   u8[*b, n K / 8]    row i of a tile holds its part i, k K / 8 bytes
    scale   f16[*b, 1]
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from qjax.chain import Link
from qjax.formats.protocol import Columns, Leaves, Scales, Tile
from qjax.formats.storage import over, stored
from qjax.formats.tiles import round_tiles, tiled, untiled
from qjax.typing import Array, Float, Integer, UInt8


@runtime_checkable
class VectorCode(Protocol):
    """A frozen record: which points tiles of r x k numbers may take, and their bytes."""

    @property
    def tile(self) -> Tile:
        """r and k."""

    @property
    def bits(self) -> int:
        """K of a number; k K is a multiple of 8."""

    @property
    def spread(self) -> float:
        """c: the scale of least squared error, of normal numbers of variance 1."""

    def nearest(
        self, u: Float[Array, "*c r k"], rows: Float[Array, "*c r"], metric: Float[Array, "k k"] | None
    ) -> tuple[Float[Array, "*c r k"], UInt8[Array, "*c r j"]]:
        """Points near tiles, and their bytes.

        Args:
          u: what they shall be.
          rows: weight of each row's error.
          metric: e M e^T is the error of a row; None: its square.
        """

    def points(self, codes: UInt8[Array, "*c r j"]) -> Float[Array, "*c r k"]:
        """The points of the bytes."""


@dataclasses.dataclass(frozen=True)
class VectorGrid(Link):
    """See the module's docstring. Two are equal when their parts are."""

    name: str
    code: VectorCode
    about: str = ""

    @property
    def block(self) -> int:
        return 0

    @property
    def tile(self) -> Tile:
        return self.code.tile

    @property
    def rows(self) -> int:
        return self.code.tile[0]

    @property
    def bits_per_weight(self) -> float:
        return float(self.code.bits)

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        rms = jnp.sqrt(_summed(w * w) * (1.0 / w.shape[-1]))
        return {"scale": stored(self.code.spread * rms, "f16")}

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> UInt8[Array, "*b m"]:
        s = scales["scale"].reshape(-1, 1)
        return round_tiles(self, (s, None), w.reshape(-1, w.shape[-1]))[1].reshape(*w.shape[:-1], -1)

    def decode(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Float[Array, "*b n"]:
        return scales["scale"] * self.basis(codes)[0]

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b m"]]:
        """Codes nearest on the scales of `fit`, then the scales of least (weighted) error for these codes."""
        scales = self.fit(w)
        codes = self.nearest(scales, w)
        (p,) = self.basis(codes)
        vp = p if weight is None else weight * p
        power, found = _summed(vp * p), _summed(vp * w)
        best = jnp.where((power > 0) & (scales["scale"] > 0), over(found, power), scales["scale"])
        return {"scale": stored(best, "f16")}, codes

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> Columns:
        return scales["scale"], None

    def round(
        self, columns: Columns, target: Float[Array, "*c r k"], metric: Float[Array, "k k"] | None = None
    ) -> tuple[Float[Array, "*c r k"], UInt8[Array, "*c r j"]]:
        s = jnp.where(jnp.isfinite(columns[0]), columns[0], 0.0)  # a row that is none spoils no other of its tile
        top = jnp.max(jnp.abs(s), axis=-1, keepdims=True)
        share = jnp.where(top > 0, over(s, top), 1.0)
        u = over(target, s[..., None])
        points, codes = self.code.nearest(jnp.where(jnp.isfinite(u), u, 0.0), share * share, metric)
        return columns[0][..., None] * points, codes

    def basis(self, codes: Integer[Array, "*b m"]) -> tuple[Array, ...]:
        flat = codes.reshape(-1, codes.shape[-1])
        (r, k), bits = self.tile, self.code.bits
        points = self.code.points(tiled(flat, (r, k * bits // 8)))
        return (untiled(points).reshape(*codes.shape[:-1], -1),)

    def store(self, scales: Scales, columns: Columns) -> Scales:
        return {"scale": stored(columns[0], "f16")}

    def pack(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Leaves:
        return {"codes": codes, "scale": scales["scale"].astype(jnp.float16)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b m"]]:
        return {"scale": leaves["scale"].astype(jnp.float32)}, leaves["codes"]

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        *lead, m = leaves["codes"].shape
        return (*lead, m * 8 // self.code.bits)


def _summed(x: Float[Array, "*b n"]) -> Float[Array, "*b 1"]:
    """The sum of each row, in the same order whatever the program does with x before."""
    return jnp.sum(lax.optimization_barrier(x), axis=-1, keepdims=True)
