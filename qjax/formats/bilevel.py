"""Integers whose group scales and zeros are themselves affine codes: SpQR's bilevel quantization.

    w_hat = s (q - z)        q in [0, 2^b - 1]
    s = a_s + d_s q_s        z = a_z + d_z q_z        q_s, q_z in [0, 2^k - 1];  a, d: f16, one of each per S groups

    uint<b>_g<g>_bilevel<k>x<S>        uint3_g16_bilevel3x16: 3 + (3 + 3) / 16 + 64 / 256 = 3.625 bits

A group's range is min-max and includes 0, as in GPTQ, so that z lies in [0, 2^b - 1]. The S groups lie one after
another in a row, so that a row can be rounded without the others; the paper's are the same group of S rows, of equal
size. Zeros are found for the scales as stored.

Leaves, for weights [*b, n] in G = n / g groups:

    codes         the b-bit stream u8[*b, G, g b / 8]
    scale, zero   the k-bit streams u8[*b, G / S, S k / 8]
    second        f16[*b, G / S, 4]: a_s, d_s, a_z, d_z

Source: SpQR, arXiv:2306.03078, section 4.1 (bilevel quantization).
"""

from __future__ import annotations

import dataclasses
import re

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.grid import Grid, Scaling
from qjax.formats.levels import Integers
from qjax.formats.protocol import Scales
from qjax.formats.storage import over, quotient
from qjax.formats.stores import Steps
from qjax.formats.streams import Codes, Floats, Streams
from qjax.typing import Array

_SECOND = ("scale_low", "scale_step", "zero_low", "zero_step")


@dataclasses.dataclass(frozen=True)
class BilevelScales(Scaling):
    """s and z as steps: {"scale", "zero"} u8[*b, G] under {"scale_low", "scale_step", ...} f32[*b, G / S].

    Attributes:
      group: weights that share a scale and a zero.
      second: bits of a scale's and of a zero's code.
      groups: groups that share a second level.
    """

    group: int
    second: int
    groups: int

    @property
    def block(self) -> int:
        return self.group * self.groups

    @property
    def signed(self) -> bool:
        return False

    @property
    def scale(self) -> Steps:
        return Steps("scale", 2**self.second - 1)

    @property
    def zero(self) -> Steps:
        return Steps("zero", 2**self.second - 1)

    def fit(self, levels: Integers, w: Array, weight: Array | None) -> Scales:
        """The range of each group, its scales first."""
        x = w.reshape(*w.shape[:-1], -1, self.group)
        low, high = jnp.minimum(x.min(axis=-1), 0.0), jnp.maximum(x.max(axis=-1), 0.0)
        scales = self.scale.fit(quotient(high - low, levels.high), self.groups)
        z = jnp.clip(over(-low, self.scale.get(scales)), 0.0, levels.high)
        return scales | self.zero.fit(z, self.groups)


def bilevel(bits: int = 3, group: int = 16, second: int = 3, groups: int = 16) -> Grid:
    """A format of integers under bilevel scales.

    Args:
      bits: of a weight's code, 2 to 8.
      group: weights that share a scale and a zero.
      second: bits of a scale's and of a zero's code, 2 to 8.
      groups: groups that share a second level.

    Raises:
      UserError: bits out of range, or groups that do not end on a byte.
    """
    for what, b, count in (("group", bits, group), ("second level", second, groups)):
        if b not in range(2, 9):
            raise UserError(f"bilevel format: codes have 2 to 8 bits, got {b}")
        if count <= 0 or count * b % 8:
            raise UserError(
                f"bilevel format: a {what} of {count} codes of {b} bits does not end on a byte; make it a multiple of 8"
            )
    above = [Codes(key, second, group, groups) for key in ("scale", "zero")]
    layout = Streams(bits, group, (*above, Floats("second", "f16", group * groups, _SECOND)))
    per = f"a scale and a zero of {second} bits per {group}, ranges of these per {groups} groups"
    name, about = f"uint{bits}_g{group}_bilevel{second}x{groups}", f"SpQR: {bits}-bit integers, {per}"
    return Grid(name, Integers(0, 2**bits - 1), BilevelScales(group, second, groups), layout, about)


_NAME = re.compile(r"uint(\d+)_g(\d+)_bilevel(\d+)x(\d+)")


def parse(name: str) -> Grid | None:
    """The format of a name by the grammar above; None for other names.

    >>> parse("uint3_g16_bilevel3x16").bits_per_weight
    3.625
    """
    found = _NAME.fullmatch(name)
    return bilevel(*map(int, found.groups())) if found else None


FORMATS = (bilevel(),)
