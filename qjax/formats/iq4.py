"""IQ4_NL and IQ4_XS: four-bit codes into a fixed table of 16 uneven levels.

    w = d T[q]  (IQ4_NL, 32 weights a block)        w = d sc T[q]  (IQ4_XS, 256 in sub-blocks of 32, sc in [-32, 31])

    T = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113

    IQ4_NL, 18 bytes:   d, qs[16]       byte l = q[l], q[l+16] << 4
    IQ4_XS, 136 bytes:  d, scales_h u16 (top 2 bits of sc + 32 per sub-block), scales_l[4] (its low 4 bits)
                        qs[128]         per 32 weights 16 bytes, as IQ4_NL

Source: ggml's block_iq4_nl, block_iq4_xs. The search is our own: scales of both signs (the table is lopsided), judged
by the squared error itself (ggml weighs by x^2 where no importance is given); see `symmetric_search` for IQ4_XS.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats.fields import Blocks, Half, Planes, Stream
from qjax.formats.grid import GGML
from qjax.formats.levels import Levels, Table
from qjax.formats.protocol import Scales
from qjax.formats.stores import Stored
from qjax.formats.superblock import ByReciprocal, by_chunks, once, reciprocal, squares, store
from qjax.formats.symmetric_search import Symmetric, SymmetricScales, error, real_scales

LEVELS = Table((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), up=True)
_FAR = tuple(np.linspace(-114, -142, 8).tolist())
_NEAR = tuple(np.linspace(101, 127, 8).tolist())
_POLISH = 3


@dataclasses.dataclass(frozen=True)
class SignedScale(ByReciprocal):
    """d, an fp16 number of either sign: {"d": f32[*b, n / block]}."""

    block: int = 32
    scale = Stored("d", store)

    def fit(self, levels: Levels, w: Array, weight: Array | None) -> Scales:
        """The scale of least squared error found: trials of both signs, then least squares, each judged in fp16."""
        (d,) = by_chunks(lambda x, v: _search(x, v, levels), w, weight, self.block, self.block)
        return {"d": d[..., 0]}


def _search(x: Array, v: Array | None, levels: Any) -> tuple[Array]:
    """x f32[32, 1, N] -> d f32[1, N]."""

    def value(u: Array) -> Array:
        return levels.round(u)[0]

    d = store(real_scales(x, v, value, (*_FAR, *_NEAR)))
    best = error(x, v, d, value), d
    for _ in range(_POLISH):
        (t,) = once(value(x * reciprocal(best[1])[None]))
        vt = t if v is None else v * t
        d = store(jnp.sum(vt * x, axis=0) * reciprocal(jnp.sum(vt * t, axis=0)))
        e = error(x, v, d, value)
        best = jnp.where(e < best[0], e, best[0]), jnp.where(e < best[0], d, best[1])
    # No level is zero: where the least fp16 scale is still too coarse, zeros are nearer.
    return (jnp.where((squares(x, v) < best[0]) & jnp.isfinite(best[1]), 0.0, best[1]),)


_XS = (Half("d"), Stream("sc", 8, 2, shift=4), Stream("sc", 8, 4), Planes("q", 256, 4, 32))

FORMATS = (
    GGML(
        "IQ4_NL", LEVELS, SignedScale(), Blocks(20, 32, (Half("d"), Planes("q", 32, 4))),
        "GGUF: 16 levels spaced for bell-shaped weights, one fp16 scale",
    ),
    GGML(
        "IQ4_XS", LEVELS, SymmetricScales(Symmetric(32, (*_FAR[::2], *_NEAR[::2]), down=3, up=3), 32),
        Blocks(23, 256, _XS, (("sc", 32),)), "GGUF: IQ4_NL's levels, 8 groups with 6-bit scales",
    ),
)  # fmt: skip
