"""Tables of levels that are learned, one a row: SqueezeLLM's and LNQ's.

    w_hat = table[row, code]        lut2, lut3, lut4: 4, 8, 16 levels of f16

`fit` is weighted k-means of each row (kmeans.py); with the diagonal of a Fisher matrix as weight it is SqueezeLLM's
(arXiv:2306.07629, section 4.1). Weights are linear in the entries, which are the format's columns: `refit` solves for
them in the metric of H, and with descent in turns is LNQ (GuidedQuant, arXiv:2505.07004, section 4).

Leaves, for weights [*b, n]; n b is a multiple of 8:

    codes   u8[*b, 1, n b / 8]    a bit stream a row (bits.py)
    table   f16[*b, 1, 2^b]       16 2^b / n bits a weight, which `bits_per_weight` leaves out: 0.25 at b = 4, n = 1024
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from qjax.chain import Link
from qjax.formats.kmeans import assigned, kmeans
from qjax.formats.protocol import Columns, Leaves, Scales, Tile
from qjax.formats.storage import stored
from qjax.formats.streams import Floats, Streams
from qjax.typing import Array, Float, Integer, UInt8


@dataclasses.dataclass(frozen=True)
class LookupTable(Link):
    """See the module's docstring.

    Attributes:
      bits: b, of a code.
    """

    bits: int

    @property
    def name(self) -> str:
        return f"lut{self.bits}"

    @property
    def about(self) -> str:
        """A line for `qjax formats`."""
        return f"SqueezeLLM, LNQ: {2**self.bits} learned levels a row, f16"

    @property
    def block(self) -> int:
        return 0

    @property
    def tile(self) -> Tile:
        return 1, 1

    @property
    def rows(self) -> int:
        return 1

    @property
    def layout(self) -> Streams:
        return Streams(self.bits, 0, (Floats("table", "f16", 0),))

    @property
    def bits_per_weight(self) -> float:
        return self.layout.bits

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        return {"table": stored(kmeans(w, weight, 2**self.bits), "f16")[..., None, :]}

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> UInt8[Array, "*b n"]:
        return assigned(w, scales["table"][..., 0, :]).astype(jnp.uint8)

    def decode(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
        return _entries(scales["table"][..., 0, :], codes)

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, UInt8[Array, "*b n"]]:
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def columns(self, scales: Scales, shape: tuple[int, ...]) -> Columns:
        return *(scales["table"][..., k] for k in range(2**self.bits)), None

    def round(
        self, columns: Columns, target: Float[Array, "*c 1 1"], metric: Array | None = None
    ) -> tuple[Float[Array, "*c 1 1"], UInt8[Array, "*c 1 1"]]:
        table = jnp.stack(columns[:-1], axis=-1)[..., 0, :]
        code = assigned(target[..., 0], table)
        return _entries(table, code)[..., None], code[..., None].astype(jnp.uint8)

    def basis(self, codes: Integer[Array, "*b n"]) -> tuple[Array, ...]:
        return tuple((codes == k).astype(jnp.float32) for k in range(2**self.bits))

    def store(self, scales: Scales, columns: Columns) -> Scales:
        return {"table": stored(jnp.stack(columns[:-1], axis=-1), "f16")}

    def pack(self, scales: Scales, codes: Integer[Array, "*b n"]) -> Leaves:
        return self.layout.pack(scales, codes)

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b n"]]:
        return self.layout.unpack(leaves)

    def shape(self, leaves: Leaves) -> tuple[int, ...]:
        return self.layout.shape(leaves)


def _entries(table: Float[Array, "*b k"], codes: Integer[Array, "*b n"]) -> Float[Array, "*b n"]:
    """table[code]: selections, which vectorize."""
    value = jnp.broadcast_to(table[..., :1], codes.shape)
    for k in range(1, table.shape[-1]):
        value = jnp.where(codes == k, table[..., k : k + 1], value)
    return value


FORMATS = tuple(LookupTable(bits) for bits in (2, 3, 4))
