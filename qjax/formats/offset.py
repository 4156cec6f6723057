"""Integers of 2 to 8 bits between a group's minimum and maximum, as MLX has them: w_hat = s q + m.

    uint<bits>_g<group>_m [_bf16|_f32]        q in [0, 2^bits - 1];  s = (max - min) / (2^bits - 1), m = min

s and m are floats of one type, f16 unless the name says another; m is free, where the zeros of uint4_g64 are codes.
A scale that is read may be negative.

Leaves, for weights [*b, n] in G = n / g groups: codes u8[*b, G, g b / 8], a little-endian bit stream; scale, bias
f16 | bf16 | f32 [*b, G]. Source: mlx.core.quantize.
"""

from __future__ import annotations

import dataclasses
import re

from qjax.errors import UserError
from qjax.formats.grid import Grid, Scaling
from qjax.formats.levels import Integers
from qjax.formats.protocol import Scales
from qjax.formats.storage import FLOATS, quotient
from qjax.formats.stores import Stored
from qjax.formats.streams import Floats, Streams
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class ScaleAndBias(Scaling):
    """s and m of a group: {"scale": f32[*b, G], "bias": f32[*b, G]}."""

    block: int
    kind: str = "f16"

    @property
    def scale(self) -> Stored:
        return Stored("scale", self.kind)

    @property
    def offset(self) -> Stored:
        return Stored("bias", self.kind)

    def fit(self, levels: Integers, w: Array, weight: Array | None) -> Scales:
        """The range cut evenly; a weight of importance is not looked at."""
        x = w.reshape(*w.shape[:-1], -1, self.block)
        low, high = x.min(axis=-1), x.max(axis=-1)
        return self.scale.put({}, quotient(high - low, levels.high)) | self.offset.put({}, low)


def scale_and_bias(bits: int, group: int = 64, kind: str = "f16") -> Grid:
    """Integers under a float scale and a float minimum; see the module's docstring.

    Args:
      bits: 2 to 8.
      group: weights that share both.
      kind: of both, "f16", "bf16" or "f32".

    Raises:
      UserError: a parameter out of range.

    >>> scale_and_bias(4).bits_per_weight
    4.5
    """
    if bits not in range(2, 9) or group <= 0 or group * bits % 8 or kind not in FLOATS:
        raise UserError(
            "a format of scale and minimum has 2 to 8 bits, groups that end on a byte and f16, bf16 or f32 scales; got "
            f"{bits} bits, groups of {group}, {kind}"
        )
    name = f"uint{bits}_g{group}_m" + (f"_{kind}" if kind != "f16" else "")
    layout = Streams(bits, group, (Floats("scale", kind, group), Floats("bias", kind, group)))
    about = f"MLX: {bits}-bit integers from a group's minimum up, a {kind} scale and minimum per {group}"
    return Grid(name, Integers(0, 2**bits - 1), ScaleAndBias(group, kind), layout, about)


def parse(name: str) -> Grid | None:
    """The format of a name by the grammar above; None for other names.

    >>> parse("uint3_g32_m_bf16").bits_per_weight
    4.0
    """
    found = re.fullmatch(r"uint([2-8])_g([1-9]\d*)_m(?:_(bf16|f32))?", name)
    return found and scale_and_bias(int(found[1]), int(found[2]), found[3] or "f16")


FORMATS = (scale_and_bias(4, 64),)
