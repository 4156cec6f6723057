"""ggml's FP4 types: the sixteen levels of E2M1, doubled to integers, times a power of two or an 8-bit float.

    type    B    bytes   fields
    MXFP4   32   17      e | qs[16]             T[q] 2^(e - 128), e E8M0; 0xFF is NaN
    NVFP4   64   36      s[4] | qs[4][8]        T[q] ue4m3(s) / 2, one s for 16 weights; 0xFF is NaN

T = 0 1 2 3 4 6 8 12 and, with bit 3 set, their negatives (both zeros are +0). Byte j of a group of 32 (16) weights
holds weight j in its low nibble and weight j + 16 (j + 8) in its high nibble. NVFP4's second-level scale is a tensor
of its own in the file (`<name>.scale`) and not part of the format. Layouts: ggml-common.h of llama.cpp.

Without importance `encode` gives ggml's exact bytes: e = floor(log2 absmax) - 2, s = ue4m3(absmax / 6), the nearest
level, ties to the smaller. ggml ignores importance; here `weight` picks the best of a few neighbouring scales. ggml
reads the two NaN bytes as numbers, and never writes them. How scales are bytes: ggml_scale_bytes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import exact
from qjax.formats.fields import Blocks, Planes, merge, split
from qjax.formats.ggml_scale_bytes import (
    INFINITY,
    LOG2_ROUNDS_UP,
    NAN,
    QUIET,
    ScaleBytes,
    assembled,
    e8m0,
    e8m0_byte,
    two_to,
    ue4m3,
    ue4m3_byte,
)
from qjax.formats.grid import GGML, Scaling
from qjax.formats.levels import SignMagnitude
from qjax.formats.protocol import Scales
from qjax.formats.storage import quotient
from qjax.formats.stores import Stored

E2M1 = SignMagnitude((0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
_LEVELS = E2M1.magnitudes[1:]
_MIDS = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # half way to the level below


def _power_of_two(s: Array) -> Array:
    """The nearer power of two."""
    return e8m0(jnp.clip(((exact.magnitude(s) + 0x00400000) >> 23) + 1, 2, 254))


def _half_e4m3(s: Array) -> Array:
    return ue4m3(ue4m3_byte(2 * s))


_NEAR = (2 / 3, 0.875, 15 / 16, 1.1, 1.25, 1.5)
"""The bytes before and behind, some beyond, and Four-over-Six (arXiv:2512.02010): a peak at 6 comes to 4, or back."""


@dataclasses.dataclass(frozen=True)
class PowerOfTwo(Scaling):
    """d = 2^(e - 128) for 32 weights: {"d": f32[*b, n/32]}. The two smallest are float32 denormals, which XLA's
    arithmetic flushes, so everything here works on bits."""

    block: int = 32
    scale = Stored("d", _power_of_two, (0.5, 2.0))

    def fit(self, levels: SignMagnitude, w: Array, weight: Array | None) -> Scales:
        """e = floor(log2 absmax) - 2 + 127; with `weight`, the best of its neighbours."""
        x = split(w, self.block)
        peak = jnp.max(exact.magnitude(x), axis=-1)
        rounded_up = jnp.asarray(LOG2_ROUNDS_UP)[peak >> 23]
        e = jnp.maximum(((peak + rounded_up) >> 23) - 2, 0)
        if weight is not None:
            e = _best_neighbour(self, levels, x, split(weight, self.block), e, (-1, 1), 254, e8m0)
        return {"d": e8m0(e)}

    def nearest(self, levels: SignMagnitude, scales: Scales, w: Array) -> Array:
        e = e8m0_byte(scales["d"])[..., None]
        limits = [  # a level beyond float32 is never the nearest
            jnp.where(two_to(e, level) == INFINITY, INFINITY, two_to(e, mid))
            for level, mid in zip(_LEVELS, _MIDS, strict=True)
        ]
        return merge(_above(split(w, self.block), limits))

    def decode(self, levels: SignMagnitude, scales: Scales, codes: Array) -> Array:
        q = split(codes, self.block).astype(jnp.int32)
        e = e8m0_byte(scales["d"])[..., None]
        exponent, half = (q >> 1) & 3, q & 1
        field = exponent + e - 1  # T = (1 + half / 2) 2^exponent, but T[1] = 1
        mantissa = jnp.where(exponent > 0, half << 22, 0)
        bits = jnp.where((q & 7) == 0, 0, assembled(field, mantissa))
        sign = jnp.where(((q & 8) != 0) & ((q & 7) != 0), jnp.int32(-(2**31)), 0)
        bits = jnp.where(e == NAN, QUIET, bits | sign)
        return merge(lax.bitcast_convert_type(bits, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Float8Scale(Scaling):
    """d = ue4m3(s) / 2 for 16 weights, four in a block: {"d": f32[*b, n/16]}."""

    block: int = 64
    group: int = 16
    scale = Stored("d", _half_e4m3, _NEAR)

    def fit(self, levels: SignMagnitude, w: Array, weight: Array | None) -> Scales:
        """s = ue4m3(absmax / 6); with `weight`, the best of its neighbours."""
        x = split(w, self.group)
        s = ue4m3_byte(quotient(jnp.max(jnp.abs(x), axis=-1), 6))
        s = jnp.where(s >= 0x78, 0x7E, s)  # ggml takes 448 for every scale from 256 up
        if weight is not None:
            s = _best_neighbour(self, levels, x, split(weight, self.group), s, tuple(range(-3, 6)), 0x7E, ue4m3)
        return {"d": ue4m3(s)}

    def nearest(self, levels: SignMagnitude, scales: Scales, w: Array) -> Array:
        d = scales["d"][..., None]
        q = _above(split(w, self.group), [exact.magnitude(d * mid) for mid in _MIDS])
        return merge(jnp.where(d == 0, jnp.uint8(0), q))


def _above(x: Array, limits: list[Array]) -> Array:
    """How many of the rising limits (bits, [*b, 1]) |x| exceeds, with the sign in bit 3: u8[*b, group]."""
    magnitude = exact.magnitude(x)
    q = jnp.zeros(x.shape, jnp.uint8)
    for limit in limits:
        q = q + (magnitude > limit).astype(jnp.uint8)
    return jnp.where(jnp.signbit(x) & (q > 0), q | 8, q)


def _best_neighbour(
    scaling: Scaling,
    levels: SignMagnitude,
    x: Array,
    weight: Array,
    start: Array,
    steps: tuple[int, ...],
    most: int,
    value: Callable[[Array], Array],
) -> Array:
    """The scale byte of least weighted error among start and start + steps: int32[*b]."""
    peak = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    unit = jnp.where(peak > 1e-30, peak, 1.0)
    largest = jnp.max(weight, axis=-1, keepdims=True)
    v = weight / jnp.where(largest > 0, largest, 1.0)
    offsets, rows = jnp.asarray(steps, jnp.int32), merge(x)

    def error(byte: Array) -> Array:
        scales = {"d": value(byte)}
        off = split(rows - scaling.decode(levels, scales, scaling.nearest(levels, scales, rows)), x.shape[-1])
        return jnp.sum(v * jnp.square(off / unit), axis=-1)

    def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        byte = jnp.clip(start + offsets[i], 0, most)
        e = error(byte)
        return jnp.where(e < best[1], byte, best[0]), jnp.minimum(e, best[1])

    return lax.fori_loop(0, len(steps), body, (start, error(start)))[0]


FORMATS = (
    GGML(
        "MXFP4", E2M1, PowerOfTwo(), Blocks(39, 32, (ScaleBytes("d", 1, "e8m0"), Planes("q", 32, 4))),
        "OCP microscaling: 4-bit floats (E2M1), a power of two per block",
    ),
    GGML(
        "NVFP4", E2M1, Float8Scale(), Blocks(40, 64, (ScaleBytes("d", 4, "ue4m3"), Planes("q", 64, 4, 16))),
        "4-bit floats (E2M1), an 8-bit float scale per 16",
    ),
)  # fmt: skip
