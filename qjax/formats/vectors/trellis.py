"""trellis2_L12_3inst and its like: paths through a bitshift trellis over tiles of 16 x 16, exactly K bits a weight.

    trellis K _ L bits of the state _ code        K = 1 ... 4,  L = 8 ... 16,  code 1mad, 3inst, mul1 or hyb

The 256 weights of a tile, row by row, are the values of the states of one ring of 256 K bits, a state the L bits of the
ring that end with the weight's own K (with the pair's own 2 K, for hyb); trellis_codes.py says which values, viterbi.py
how the ring is found. Row i of a tile stores bits 16 K i ... 16 K (i + 1) - 1, the first bit of a byte the highest.

In a metric of the tile's columns a path minimizes its diagonal's part alone: no path knows yet what the later weights
of its row will miss. Each further bit of L costs twice the time and brings the error nearer to 4^-K.

Source: QTIP, arXiv:2406.11235.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.formats.protocol import Tile
from qjax.formats.storage import over
from qjax.formats.vectors.grid import VectorGrid
from qjax.formats.vectors.trellis_codes import CODES
from qjax.formats.vectors.viterbi import rings
from qjax.typing import Array, Float, Integer, UInt8

SIDE = 16
SPREAD = {1: 0.92, 2: 1.02, 3: 1.08, 4: 1.13}


@dataclasses.dataclass(frozen=True)
class Trellis:
    """See the module's docstring."""

    bits: int
    L: int
    code: str

    @property
    def tile(self) -> Tile:
        return SIDE, SIDE

    @property
    def step(self) -> int:
        """Bits of a symbol: K, or 2 K where a state stands for two weights."""
        return self.bits * CODES[self.code][1]

    @property
    def spread(self) -> float:
        """The inverse rms of the values, and a little more or less: few bits want them narrower than normal numbers,
        many want them wider. Measured at L = 12, within 1 % of the least error for every code."""
        return SPREAD[self.bits] / _rms(self)

    def values(self) -> Float[Array, "S V"]:
        """Of all 2^L states."""
        return CODES[self.code][0](jnp.arange(2**self.L, dtype=jnp.uint32))

    def nearest(
        self, u: Float[Array, "*c 16 16"], rows: Float[Array, "*c 16"], metric: Float[Array, "16 16"] | None
    ) -> tuple[Float[Array, "*c 16 16"], UInt8[Array, "*c 16 j"]]:
        columns = jnp.ones(SIDE, jnp.float32) if metric is None else jnp.diagonal(metric)
        weight = rows[..., None] * over(columns, jnp.max(columns)).reshape((1,) * rows.ndim + (SIDE,))
        paths, V = math.prod(u.shape[:-2]), CODES[self.code][1]
        x, weight = (a.reshape(paths, SIDE * SIDE // V, V) for a in (u, weight))
        symbols = rings(x, weight, self.values(), self.step)
        codes = in_bytes(symbols, self.step).reshape(*u.shape[:-1], -1)
        return self.points(codes), codes

    def points(self, codes: UInt8[Array, "*c 16 j"]) -> Float[Array, "*c 16 16"]:
        *c, side, j = codes.shape
        states = windows(codes.reshape(*c, side * j), self.step, self.L)
        return CODES[self.code][0](states).reshape(*c, SIDE, SIDE)


@cache
def _rms(code: Trellis) -> float:
    with jax.ensure_compile_time_eval():
        return float(np.sqrt(np.mean(np.square(np.asarray(code.values(), np.float64)))))


def in_bytes(symbols: Integer[Array, "*c T"], k: int) -> UInt8[Array, "*c m"]:
    """Symbols of k bits as a stream, the first bit the highest of the first byte."""
    bits = (symbols[..., None] >> _down(k, symbols.ndim)) & 1
    bits = bits.reshape(*symbols.shape[:-1], -1, 8)
    return jnp.sum(bits << _down(8, symbols.ndim), axis=-1).astype(jnp.uint8)


def windows(stream: UInt8[Array, "*c m"], k: int, L: int) -> Integer[Array, "*c T"]:
    """The ring's states: after each k bits the last L, u32; L at most 16.

    A window lies in three neighbouring bytes, and where in them repeats after lcm(k, 8) bits.
    """
    period = math.lcm(k, 8)
    near = sum(jnp.roll(stream, back, axis=-1).astype(jnp.uint32) << (8 * back) for back in (1, 2))
    near = (near + stream.astype(jnp.uint32)).reshape(*stream.shape[:-1], -1, period // 8)
    ends = range(k - 1, period, k)
    found = [(near[..., end // 8] >> (7 - end % 8)) & (2**L - 1) for end in ends]
    return jnp.stack(found, axis=-1).reshape(*stream.shape[:-1], -1)


def _down(count: int, rank: int) -> Array:
    """count - 1 ... 0 on the last of rank + 1 axes."""
    return jnp.arange(count - 1, -1, -1, dtype=jnp.int32).reshape((1,) * rank + (count,))


def trellis(bits: int = 2, L: int = 12, code: str = "3inst") -> VectorGrid:
    """A trellis format; see the module's docstring.

    Args:
      bits: K, 1 to 4.
      L: bits of a state, 8 to 16.
      code: 1mad, 3inst, mul1 or hyb.

    Raises:
      UserError: another code, K or L out of range, or hyb of as many bits a pair as a state.
    """
    name = f"trellis{bits}_L{L}_{code}"
    if code not in CODES:
        raise UserError(f"{name}: a trellis' code is one of {', '.join(CODES)}, got {code!r}")
    if not 1 <= bits <= 4 or not 8 <= L <= 16:
        raise UserError(f"{name}: a trellis has 1 to 4 bits a weight and states of 8 to 16 bits, got {bits} and {L}")
    made = Trellis(bits, L, code)
    if made.step >= L:
        raise UserError(f"{name}: a state of {L} bits has no room behind the {made.step} of a pair; take a larger L")
    return VectorGrid(name, made, f"QTIP: a path through 2^{L} states for 16 x 16 weights, f16 scale a row")


def parse(name: str) -> VectorGrid | None:
    """Any trellis, "trellis3_L16_mul1"; None for other names.

    >>> parse("trellis2_L12_3inst") == trellis(2, 12, "3inst"), parse("trellis2_L12_3inst").bits_per_weight
    (True, 2.0)
    """
    found = re.fullmatch(r"trellis(\d+)_L(\d+)_(\w+)", name)
    return found and trellis(int(found[1]), int(found[2]), found[3])


FORMATS = (*(trellis(bits) for bits in (2, 3, 4)), *(trellis(2, code=code) for code in ("1mad", "mul1", "hyb")))
