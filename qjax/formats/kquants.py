"""ggml's K-quants: super-blocks of 256 weights under fp16 numbers, sub-blocks with scales of a few bits under these.

    Q2_K Q4_K Q5_K   w = d sc q - dmin mn    sc, mn of 4 bits (Q2_K) or 6;  q of 2, 4 or 5 bits
    Q3_K Q6_K        w = d sc q              sc of 6 bits in [-32, 31] or int8;  q in [-4, 3] or [-32, 31]

    Q2_K, 84 bytes, 16 x 16:   scales[16]  mn << 4 | sc
                               qs[64]      per 128 weights 32 bytes, byte l = q[l] | q[l+32] << 2 | q[l+64] << 4 | ...
                               d, dmin
    Q4_K, 144 bytes, 8 x 32:   d, dmin, scales[12]
                               qs[128]     per 64 weights 32 bytes, byte l = q[l], q[l+32] << 4
    Q5_K, 176 bytes, 8 x 32:   d, dmin, scales[12]
                               qh[32]      bit j of byte l = bit 4 of q[32 j + l]
                               qs[128]     low four bits as Q4_K
    Q3_K, 110 bytes, 16 x 16:  hmask[32]   bit j of byte l = bit 2 of q[32 j + l] + 4
                               qs[64]      low two bits of q + 4 as Q2_K
                               scales[12]  u = sc + 32: byte j < 8 = low nibbles of u[j], u[j+8];
                                           byte 8 + i = top two bits of u[i], u[i+4], u[i+8], u[i+12]
                               d
    Q6_K, 210 bytes, 16 x 16:  ql[128]     per 128 weights 64 bytes, byte l = low nibbles of q + 32 of l, l+64
                               qh[64]      top two bits of q + 32 as Q2_K
                               scales[16]  int8
                               d

    scales[12], j < 4:   byte j      sc[j]  low 6 bits,  sc[j+4] >> 4  top 2
                         byte j + 4  mn[j]  low 6 bits,  mn[j+4] >> 4  top 2
                         byte j + 8  sc[j+4] low nibble, mn[j+4] high nibble

Source: ggml's block_q2_K ... block_q6_K (k-quants, llama.cpp PR 1684). The bytes mean what they mean there; which
bytes a tensor gets is our own search (affine_search.py, symmetric_search.py), which minimizes the plain or
importance-weighted squared error itself (ggml without importance weighs by x^2).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from qjax.formats.affine_search import NEAR, WIDE, WIDEST, Affine, AffineScales
from qjax.formats.fields import Blocks, Field, Half, Nibbles, Planes, Stream
from qjax.formats.grid import GGML
from qjax.formats.levels import Integers
from qjax.formats.symmetric_search import Symmetric, SymmetricScales


@dataclasses.dataclass(frozen=True)
class SixBits:
    """A field of eight scales and eight minima of 6 bits."""

    size: int = 12

    def write(self, numbers: dict[str, Array]) -> Array:
        sc, mn = numbers["sc"], numbers["mn"]
        parts = [a[..., :4] | ((a[..., 4:] >> 4) << 6) for a in (sc, mn)]
        return jnp.concatenate([*parts, (sc[..., 4:] & 15) | (mn[..., 4:] << 4)], axis=-1)

    def read(self, raw: Array) -> dict[str, Array]:
        a, b, low = raw[..., :4], raw[..., 4:8], raw[..., 8:]
        sc = jnp.concatenate([a & 63, (low & 15) | ((a >> 6) << 4)], axis=-1)
        return {"sc": sc, "mn": jnp.concatenate([b & 63, (low >> 4) | ((b >> 6) << 4)], axis=-1)}


def _affine(name: str, number: int, bits: int, sub: int, how: Affine, *fields: Field) -> GGML:
    about = f"GGUF K-quant: {bits} bits, {256 // sub} groups with {4 if bits == 2 else 6}-bit scales and minima"
    return GGML(name, Integers(0, 2**bits - 1), AffineScales(how, sub), Blocks(number, 256, fields), about)


def _symmetric(name: str, number: int, bits: int, how: Symmetric, bias: int, *fields: Field) -> GGML:
    about = f"GGUF K-quant: {bits} bits signed, 16 groups with {6 if bits == 3 else 8}-bit scales"
    half = 2 ** (bits - 1)
    layout = Blocks(number, 256, (*fields, Half("d")), (("q", half), ("sc", bias)))
    return GGML(name, Integers(-half, half - 1), SymmetricScales(how, 16), layout, about)


_D, _MIN = Half("d"), Half("dmin")
_TWO, _FOUR, _HIGH = Planes("q", 256, 2, 128), Planes("q", 256, 4, 64), Planes("q", 256, 1, shift=4)
_TRIALS = (-3.2, -3.7, -4.2, -4.8, 3.0, 3.5, 4.0, 4.6)

FORMATS = (
    _affine("Q2_K", 10, 2, 16, Affine(15, (0.0, 0.125, 0.25), NEAR), Nibbles("sc", "mn", 16), _TWO, _D, _MIN),
    _affine("Q4_K", 12, 4, 32, Affine(63, (0.0, 0.033, 0.067, 0.1), WIDE), _D, _MIN, SixBits(), _FOUR),
    _affine("Q5_K", 13, 5, 32, Affine(63, (0.0, 0.025, 0.05), WIDEST), _D, _MIN, SixBits(), _HIGH, _FOUR),
    _symmetric(
        "Q3_K", 11, 3, Symmetric(32, _TRIALS, down=8, up=8), 32,
        Planes("q", 256, 1, shift=2), _TWO, Planes("sc", 16, 4), Planes("sc", 16, 2, shift=4),
    ),
    _symmetric(
        "Q6_K", 14, 6, Symmetric(128, (-32.0,), down=3, up=18, headroom=1.06), 0,
        Planes("q", 256, 4, 128), Planes("q", 256, 2, 128, shift=4), Stream("sc", 16, 8),
    ),
)  # fmt: skip
