"""ggml's FP4 types: the sixteen levels of E2M1, doubled to integers, times a power of two or an 8-bit float.

    type    B    bytes   fields
    MXFP4   32   17      e | qs[16]             T[q] 2^(e - 128), e E8M0; 0xFF is NaN
    NVFP4   64   36      s[4] | qs[4][8]        T[q] ue4m3(s) / 2, one s for 16 weights; 0xFF is NaN

T = 0 1 2 3 4 6 8 12 and, with bit 3 set, their negatives (both zeros are +0). Byte j of a group of 32 (16) weights
holds weight j in its low nibble and weight j + 16 (j + 8) in its high nibble. NVFP4's second-level scale is a tensor
of its own in the file (`<name>.scale`) and not part of the format. Layouts: ggml-common.h of llama.cpp.

Without importance `encode` gives ggml's exact bytes: e = floor(log2 absmax) - 2, s = ue4m3(absmax / 6), the nearest
level, ties to the smaller. ggml ignores importance; here `weight` picks the best of a few neighbouring scales. ggml
reads the two NaN bytes as numbers, and never writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.chain import Link
from qjax.formats import exact
from qjax.formats.blocks import block_shape, merge, pack_planes, split, unpack_planes
from qjax.formats.protocol import Leaves, Scales

_LEVELS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_MIDS = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)  # half way to the level below
_INF, _QUIET = 0x7F800000, 0x7FC00000  # the bits of infinity and of NaN
_NAN = 0xFF  # the scale byte that is no number


@dataclasses.dataclass(frozen=True)
class MXFP4(Link):
    """w = 2^(e - 128) T[q] on blocks of 32.

    Scales: {"d": f32[*b, n/32]}, d = 2^(e - 128); the two smallest are float32 denormals, which XLA's arithmetic
    flushes, so everything here works on bits. Codes: q, uint8[*b, n].
    """

    name: str = "MXFP4"
    ggml_type: int = 39
    block: int = 32
    tile: int = 1
    row_wise: bool = True
    block_bytes: int = 17

    @property
    def about(self) -> str:
        return "OCP microscaling: 4-bit floats (E2M1), a power of two per block"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """e = floor(log2 absmax) - 2 + 127; with `weight`, the best of its neighbours."""
        x = split(w, self.block)
        peak = jnp.max(exact.magnitude(x), axis=-1)
        rounded_up = jnp.asarray(_LOG2_ROUNDS_UP)[peak >> 23]
        e = jnp.maximum(((peak + rounded_up) >> 23) - 2, 0)
        if weight is not None:
            e = _best_neighbour(self, x, split(weight, self.block), e, (-1, 1), 254, _e8m0)
        return {"d": _e8m0(e)}

    def nearest(self, scales: Scales, w: Array) -> Array:
        e = _e8m0_byte(scales["d"])[..., None]
        limits = [  # a level beyond float32 is never the nearest
            jnp.where(_two_to(e, level) == _INF, _INF, _two_to(e, mid))
            for level, mid in zip(_LEVELS, _MIDS, strict=True)
        ]
        return merge(_nearest(split(w, self.block), limits))

    def decode(self, scales: Scales, codes: Array) -> Array:
        q = split(codes, self.block).astype(jnp.int32)
        e = _e8m0_byte(scales["d"])[..., None]
        exponent, half = (q >> 1) & 3, q & 1
        field = exponent + e - 1  # T = (1 + half / 2) 2^exponent, but T[1] = 1
        mantissa = jnp.where(exponent > 0, half << 22, 0)
        bits = jnp.where((q & 7) == 0, 0, _assemble(field, mantissa))
        sign = jnp.where(((q & 8) != 0) & ((q & 7) != 0), jnp.int32(-(2**31)), 0)
        bits = jnp.where(e == _NAN, _QUIET, bits | sign)
        return merge(lax.bitcast_convert_type(bits, jnp.float32))

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return scales["d"], None

    def level(self, u: Array) -> Array:
        return _unit_level(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        bits = exact.magnitude(s) + 0x00400000  # the nearer power of two
        return {"d": _e8m0(jnp.clip((bits >> 23) + 1, 2, 254))}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        e = _e8m0_byte(scales["d"])[..., None].astype(jnp.uint8)
        return {"blocks": jnp.concatenate([e, pack_planes(split(codes, self.block), 4)], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        return {"d": _e8m0(blocks[..., 0].astype(jnp.int32))}, merge(unpack_planes(blocks[..., 1:], 4))

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)


@dataclasses.dataclass(frozen=True)
class NVFP4(Link):
    """w = ue4m3(s) / 2 T[q] on groups of 16, four to a block.

    Scales: {"d": f32[*b, n/16]}, d = ue4m3(s) / 2. Codes: q, uint8[*b, n].
    """

    name: str = "NVFP4"
    ggml_type: int = 40
    block: int = 64
    tile: int = 1
    row_wise: bool = True
    block_bytes: int = 36
    group: int = 16

    @property
    def about(self) -> str:
        return "4-bit floats (E2M1), an 8-bit float scale per 16"

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def fit(self, w: Array, weight: Array | None = None) -> Scales:
        """s = ue4m3(absmax / 6); with `weight`, the best of its neighbours."""
        x = split(w, self.group)
        s = _ue4m3_byte(exact.divided(jnp.max(jnp.abs(x), axis=-1), 6))
        s = jnp.where(s >= 0x78, 0x7E, s)  # ggml takes 448 for every scale from 256 up
        if weight is not None:
            s = _best_neighbour(self, x, split(weight, self.group), s, tuple(range(-3, 6)), 0x7E, _ue4m3)
        return {"d": _ue4m3(s)}

    def nearest(self, scales: Scales, w: Array) -> Array:
        d = scales["d"][..., None]
        q = _nearest(split(w, self.group), [exact.magnitude(d * mid) for mid in _MIDS])
        return merge(jnp.where(d == 0, jnp.uint8(0), q))

    def decode(self, scales: Scales, codes: Array) -> Array:
        q = split(codes, self.group).astype(jnp.int32)
        exponent, half = (q >> 1) & 3, q & 1
        bits = jnp.where(exponent > 0, ((127 + exponent) << 23) | (half << 22), half * 0x3F800000)
        level = lax.bitcast_convert_type(bits, jnp.float32)
        return merge(jnp.where(q > 8, -level, level) * scales["d"][..., None])

    def encode(self, w: Array, weight: Array | None = None) -> tuple[Scales, Array]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        return scales["d"], None

    def level(self, u: Array) -> Array:
        return _unit_level(u)

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        return {"d": _ue4m3(_ue4m3_byte(2 * s))}

    def pack(self, scales: Scales, codes: Array) -> Leaves:
        s = split(_ue4m3_byte(2 * scales["d"]), self.block // self.group).astype(jnp.uint8)
        q = pack_planes(split(codes, self.group), 4)
        return {"blocks": jnp.concatenate([s, q.reshape(*s.shape[:-1], self.block // 2)], axis=-1)}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Array]:
        blocks = leaves["blocks"]
        groups = self.block // self.group
        d = _ue4m3(blocks[..., :groups].astype(jnp.int32))
        q = unpack_planes(blocks[..., groups:].reshape(*d.shape, self.group // 2), 4)
        return {"d": merge(d)}, merge(merge(q))

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return block_shape(leaves, self.block)


def _nearest(x: Array, limits: list[Array]) -> Array:
    """How many of the rising limits (bits, [*b, 1]) |x| exceeds, with the sign in bit 3: u8[*b, group]."""
    magnitude = exact.magnitude(x)
    q = jnp.zeros(x.shape, jnp.uint8)
    for limit in limits:
        q = q + (magnitude > limit).astype(jnp.uint8)
    return jnp.where(jnp.signbit(x) & (q > 0), q | 8, q)


def _unit_level(u: Array) -> Array:
    """The nearest of 0, +-1 2 3 4 6 8 12, ties to the smaller."""
    size, below = jnp.zeros_like(u), 0.0
    for level, mid in zip(_LEVELS, _MIDS, strict=True):
        size = size + jnp.where(jnp.abs(u) > mid, jnp.float32(level - below), jnp.float32(0))
        below = level
    return jnp.sign(u) * size


def _best_neighbour(
    fmt: MXFP4 | NVFP4,
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
    offsets = jnp.asarray(steps, jnp.int32)

    def error(byte: Array) -> Array:
        scales = {"d": value(byte)}
        rows = merge(x)
        off = split(rows - fmt.decode(scales, fmt.nearest(scales, rows)), x.shape[-1])
        return jnp.sum(v * jnp.square(off / unit), axis=-1)

    def body(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        byte = jnp.clip(start + offsets[i], 0, most)
        e = error(byte)
        return jnp.where(e < best[1], byte, best[0]), jnp.minimum(e, best[1])

    return lax.fori_loop(0, len(steps), body, (start, error(start)))[0]


def _assemble(field: Array, mantissa: Array) -> Array:
    """The bits of (1 + mantissa / 2^23) 2^(field - 127), denormal below field 1, infinite from 255."""
    shift = jnp.clip(1 - field, 0, 24)
    bits = jnp.where(field > 0, (field << 23) | mantissa, (mantissa | 0x00800000) >> shift)
    return jnp.where(field >= 255, _INF, bits)


def _two_to(e: Array, t: float) -> Array:
    """The bits of t 2^(e - 128)."""
    bits = int(np.float32(t).view(np.int32))
    return _assemble((bits >> 23) + e - 128, jnp.int32(bits & 0x7FFFFF))


def _e8m0(e: Array) -> Array:
    """2^(e - 128) of an int32 exponent byte; NaN of 0xFF."""
    return lax.bitcast_convert_type(jnp.where(e == _NAN, _QUIET, _two_to(e, 1.0)), jnp.float32)


def _e8m0_byte(d: Array) -> Array:
    """The exponent byte of a scale 2^(e - 128): int32."""
    bits = exact.magnitude(d)
    e = jnp.where(bits >= 0x00800000, (bits >> 23) + 1, jnp.where(bits >= 0x00400000, 1, 0))
    return jnp.where(bits > _INF, _NAN, e)


def _ue4m3(byte: Array) -> Array:
    """Half the value of an unsigned E4M3 byte (int32, 0..255); of its two NaNs 0x7F is 0, as in ggml."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = lax.bitcast_convert_type(((exponent + 119) << 23) | (mantissa << 20), jnp.float32)
    value = jnp.where(exponent > 0, normal, mantissa.astype(jnp.float32) * 2.0**-10)
    return jnp.where(byte == 0x7F, 0.0, jnp.where(byte == _NAN, jnp.nan, value))


def _ue4m3_byte(x: Array) -> Array:
    """The nearest unsigned E4M3 byte, halves up, at most 448: f32 -> int32."""
    x = jnp.minimum(x, 448.0)
    small = jnp.minimum((x * 512.0 + 0.5).astype(jnp.int32), 7)
    bits = exact.magnitude(x)
    normal = ((bits + 0x00080000) >> 20) - (120 << 3)
    byte = jnp.where(x <= 0, 0, jnp.where((bits >> 23) <= 120, small, jnp.minimum(normal, 0x7E)))
    return jnp.where(bits > _INF, _NAN, byte)


def _log2_rounds_up() -> np.ndarray:
    """How far below the next power of two (in float32 steps) log2f rounds to that power's exponent, by exponent field.

    C takes floor(log2f(absmax)), and log2f of numbers just below 2^k rounds to k.
    """
    step = np.arange(1, 128)
    k = np.arange(256)[:, None] - 126.0
    rounded = (np.log2(1 - step * 2.0**-24) + k).astype(np.float32)
    return np.asarray(np.sum(rounded >= k, axis=1), np.int32)


_LOG2_ROUNDS_UP = _log2_rounds_up()

FORMATS = (MXFP4(), NVFP4())
