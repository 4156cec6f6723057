"""8-bit floats under absmax scales: w_hat = s f,  f in E4M3 (largest 448, no infinity) or E5M2 (largest 57344).

    FP8_E4M3          a scale per row (channel)           s = absmax / 448, float32
    FP8_E4M3_tensor   a scale per matrix
    FP8_E4M3_b128     a scale per 128 weights of a row

Codes are the bytes of OCP 8-bit floats (OFP8 1.0; `ml_dtypes.float8_e4m3fn`, `float8_e5m2`), rounded once to the
nearest, ties to even, saturating: XLA's own cast may go through another type and round twice. The scale covers the
largest weight and nothing is searched, so a weight of importance is not looked at.

Leaves: codes u8[*b, n]; scale f32 with w's number of axes: [*b, 1], [*b, n / block], and for a tensor [*b[:-1], 1, 1]:
a matrix is the last two axes, so that a stack has a scale for each.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qjax.errors import UserError
from qjax.formats.grid import Grid, Scaling
from qjax.formats.protocol import Leaves, Scales
from qjax.formats.storage import quotient
from qjax.formats.stores import Stored
from qjax.typing import Array, Float, Integer


class _Kind(NamedTuple):
    dtype: DTypeLike
    mantissa: int  # bits of it
    lowest: int  # exponent of the smallest normal number
    top: float  # the largest number


_KINDS = {
    "E4M3": _Kind(jnp.float8_e4m3fn, 3, -6, 448.0),
    "E5M2": _Kind(jnp.float8_e5m2, 2, -14, 57344.0),
}


@dataclasses.dataclass(frozen=True)
class Bytes:
    """All numbers of an 8-bit float type, as levels; codes are their bytes."""

    kind: str

    def round(self, u: Float[Array, "*u"]) -> tuple[Float[Array, "*u"], Integer[Array, "*u"]]:
        code = rounded(u, self.kind)
        return self.value(code), code

    def value(self, codes: Integer[Array, "*u"]) -> Float[Array, "*u"]:
        return lax.bitcast_convert_type(codes.astype(jnp.uint8), _KINDS[self.kind].dtype).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class LargestFits(Scaling):
    """s = absmax / top, f32, of a row ("channel"), a matrix ("tensor") or a block: {"scale": f32}."""

    scope: str
    block: int
    scale = Stored("scale", "f32")

    @property
    def rows(self) -> int:
        return 0 if self.scope == "tensor" else 1

    @property
    def signed(self) -> bool:
        return False

    def fit(self, levels: Bytes, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None) -> Scales:
        magnitude = jnp.abs(w)
        if self.block:
            absmax = jnp.max(magnitude.reshape(*w.shape[:-1], -1, self.block), axis=-1)
        else:
            axes = (-2, -1) if self.scope == "tensor" and w.ndim > 1 else (-1,)
            absmax = jnp.max(magnitude, axis=axes, keepdims=True)
        return {"scale": quotient(absmax, _KINDS[levels.kind].top)}

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> tuple[Array, None]:
        s = scales["scale"]
        return jnp.broadcast_to(s, (*shape[:-1], s.shape[-1])), None

    def store(self, scales: Scales, s: Array, m: Array | None) -> Scales:
        """A tensor's one scale stays: rows that share it cannot each have their own."""
        return scales if self.scope == "tensor" else super().store(scales, s, m)


@dataclasses.dataclass(frozen=True)
class AsTheyAre:
    """The codes' bytes and the scales."""

    block: int

    @property
    def bits(self) -> float:
        return 8 + (32 / self.block if self.block else 0.0)

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        return {"codes": codes.astype(jnp.uint8), **scales}

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        return {"scale": leaves["scale"]}, leaves["codes"]

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return leaves["codes"].shape


def float8(kind: str, scope: str = "channel", block: int = 0) -> Grid:
    """8-bit floats; see the module's docstring.

    Args:
      kind: "E4M3" or "E5M2".
      scope: what shares a scale: "channel", "tensor" or "block".
      block: weights of a block; 0 for the other scopes.

    Raises:
      UserError: another kind, a block without its scope or a scope without its block.
    """
    if kind not in _KINDS:
        raise UserError(f"an 8-bit float is {' or '.join(_KINDS)}, got {kind!r}")
    if scope not in ("channel", "tensor", "block") or (scope == "block") != (block > 0):
        raise UserError(
            f"FP8 scales are per channel, tensor (block=0) or block (block > 0); got scope={scope!r}, block={block}"
        )
    suffix = {"channel": "", "tensor": "_tensor", "block": f"_b{block}"}[scope]
    per = {"channel": "row", "tensor": "matrix", "block": f"{block}"}[scope]
    about = f"8-bit floats {kind}, an f32 scale per {per}"
    return Grid(f"FP8_{kind}{suffix}", Bytes(kind), LargestFits(scope, block), AsTheyAre(block), about)


def rounded(x: Array, kind: str) -> Array:
    """The code of the nearest 8-bit float, ties to even, saturating: f32[*b] -> u8[*b].

    x is rounded to a multiple of its binade's quantum, 2^(exponent - mantissa bits), which float32 does exactly; the
    cast that follows then has nothing left to round.

    >>> rounded(jnp.array([1.0, 1.0625, 1.0626, 1e9]), "E4M3").tolist()
    [56, 56, 57, 126]
    """
    dtype, mantissa, lowest, top = _KINDS[kind]
    x = jnp.clip(x, -top, top)
    biased = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255
    exponent = jnp.maximum(biased - 127, lowest) - mantissa

    def power(e: Array) -> Array:
        return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)

    x = jnp.round(x * power(-exponent)) * power(exponent)
    return lax.bitcast_convert_type(x.astype(dtype), jnp.uint8)


def nearest_float(x: Array, kind: str) -> Array:
    """The nearest 8-bit float, as an array of that type, in every program: XLA drops a cast to it that is undone."""
    return lax.bitcast_convert_type(rounded(x, kind), _KINDS[kind].dtype)


def parse(name: str) -> Grid | None:
    """FP8 with any block, "FP8_E4M3_b128"; None for other names.

    >>> parse("FP8_E5M2_b64") == float8("E5M2", "block", 64), parse("FP8_E4M3_tensor").block
    (True, 0)
    """
    found = re.fullmatch(r"FP8_(E4M3|E5M2)(?:_(tensor)|_b([1-9]\d*))?", name)
    if found is None:
        return None
    kind, tensor, block = found.groups()
    return float8(kind, tensor or ("block" if block else "channel"), int(block or 0))


FORMATS = tuple(
    float8(kind, scope, block) for kind in _KINDS for scope, block in (("channel", 0), ("tensor", 0), ("block", 128))
)
