"""Integers without ends at a spacing of each column's own: what an entropy coder is given, and no stored format.

    w_hat_ij = s_j z_ij         {"s": f32[*b, 1, n], fp16 numbers}, one for all rows of a matrix; z int16

Codes take 16 bits where they lie; what they are worth is their entropy (rounding/entropy.py), which is counted apart.
So this format has no name that `qjax.format` knows, and stands in no table beside formats of a fixed rate.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from qjax.formats.grid import Grid, Scaling
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import stored
from qjax.formats.stores import Stored
from qjax.typing import Array, Float, Integer

FAR = 2**15 - 1


@dataclasses.dataclass(frozen=True)
class Unbounded:
    """All integers that 16 bits hold, ties to even."""

    def round(self, u: Float[Array, "*u"]) -> tuple[Float[Array, "*u"], Integer[Array, "*u"]]:
        z = jnp.clip(jnp.round(u), -FAR, FAR)
        return z, z.astype(jnp.int16)

    def value(self, codes: Integer[Array, "*u"]) -> Float[Array, "*u"]:
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ColumnScales(Scaling):
    """One s for a column of a matrix."""

    block: int = 1
    scale = Stored("s", "f16", near=())

    @property
    def rows(self) -> int:
        return 0

    def fit(self, levels: Any, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None) -> Scales:
        """A quarter of a column's size: about four bits, until somebody says otherwise."""
        rms = jnp.sqrt(jnp.mean(jnp.square(w), axis=-2, keepdims=True))
        return {"s": stored(0.25 * rms, "f16")}

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return jnp.broadcast_to(scales["s"], shape), None

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        """They stay: rows that share them cannot each have their own."""
        return scales


@dataclasses.dataclass(frozen=True)
class AsTheyAre:
    """Codes and spacings."""

    bits: float = 16.0

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        return {"codes": codes.astype(jnp.int16), "s": scales["s"].astype(jnp.float16)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        return {"s": leaves["s"].astype(jnp.float32)}, leaves["codes"]

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return tuple(leaves["codes"].shape)


SPACED = Grid("spaced", Unbounded(), ColumnScales(), AsTheyAre(), "integers for an entropy coder, a spacing a column")
