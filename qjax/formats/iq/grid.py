"""The format of ggml's importance grids: points times scales, a tile of weights to each code.

    w_hat = s T + m        T a point of 4 or 8 weights (points.py), s = d (2 sc + 1) / unit (scales.py)

What `formats/grid.py` is to single levels. Codes are the nearest in a metric of single weights (nearest.py), and where
`round` is given one that couples the weights of a tile, near in that (in_metric.py).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qjax.formats.fields import Blocks
from qjax.formats.grid import Scaled, Scaling
from qjax.formats.iq.in_metric import nearest_in
from qjax.formats.iq.nearest import nearest, tiles
from qjax.formats.iq.points import Points
from qjax.formats.protocol import Columns, Leaves, Scales, Tile
from qjax.formats.storage import over
from qjax.typing import Array, Float, Integer

_LANES = {"cpu": 1024}  # tiles side by side: what is made ready of them stays in cache
_LANES_DEVICE = 1 << 16


@dataclasses.dataclass(frozen=True)
class PointGrid(Scaled):
    """Points times scales; see the module's docstring. Two are equal when their parts are."""

    name: str
    points: Points
    scaling: Scaling
    layout: Blocks
    about: str = ""

    @property
    def tile(self) -> Tile:
        return 1, self.points.tile

    @property
    def ggml_type(self) -> int:
        """The type's number in a GGUF file."""
        return self.layout.ggml_type

    @property
    def block_bytes(self) -> int:
        """Bytes a block."""
        return self.layout.size

    def fit(self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None) -> Scales:
        return self.scaling.fit(self.points, w, weight)

    def nearest(self, scales: Scales, w: Float[Array, "*b n"]) -> Integer[Array, "*b m"]:
        return self._codes(scales, w, None)

    def decode(self, scales: Scales, codes: Integer[Array, "*b m"]) -> Float[Array, "*b n"]:
        T = self.points.value(codes)
        return self.scaling.weights(scales, self.scaling.grouped(scales, T)).reshape(T.shape)

    def encode(
        self, w: Float[Array, "*b n"], weight: Float[Array, "*b n"] | None = None
    ) -> tuple[Scales, Integer[Array, "*b m"]]:
        """The points nearest in the metric of `weight`, which single levels do not depend on and vectors do."""
        scales = self.fit(w, weight)
        return scales, self._codes(scales, w, weight)

    def round(
        self, columns: Columns, target: Float[Array, "*c 1 k"], metric: Float[Array, "k k"] | None = None
    ) -> tuple[Float[Array, "*c 1 k"], Integer[Array, "*c 1 1"]]:
        assert columns[0] is not None
        s, m = columns[0][..., None], None if columns[1] is None else columns[1][..., None]
        t = target if m is None else target - m
        if metric is None:
            codes = _nearest(self.points, t, None, s[..., 0])
        else:
            codes = nearest_in(self.points, over(t, s), metric)
        q = s * self.points.value(codes[..., None])
        return (q if m is None else q + m), codes[..., None]

    def basis(self, codes: Integer[Array, "*b m"]) -> tuple[Array, ...]:
        return (self.points.value(codes),)

    def unpack(self, leaves: Leaves) -> tuple[Scales, Integer[Array, "*b m"]]:
        scales, codes = self.layout.unpack(leaves)
        return scales, codes.astype(jnp.uint32)

    def _codes(self, scales: Scales, w: Array, weight: Array | None) -> Array:
        s, m = self.columns(scales, w.shape)
        groups = s.shape[-1]

        def cut(a: Array) -> Array:
            return a.reshape(*a.shape[:-1], groups, -1, self.points.tile)

        t = cut(w) if m is None else cut(w) - m[..., None, None]
        wide = jnp.broadcast_to(s[..., None], t.shape[:-1])
        return _nearest(self.points, t, None if weight is None else cut(weight), wide).reshape(*w.shape[:-1], -1)


def _nearest(points: Points, t: Float[Array, "*t k"], v: Array | None, s: Float[Array, "*t"]) -> Integer[Array, "*t"]:
    """The codes of tiles, of many in turns."""

    def some(args: tuple[Array, ...]) -> Array:
        s, x, *v = args
        return nearest(tiles(points, x, v[0] if v else None), s)[1]

    def planes(a: Array) -> Array:
        """A weight of each tile in every plane, [turns, k, lanes]; or [turns, lanes]."""
        a = jnp.pad(a, [(0, turns * lanes - count)] + [(0, 0)] * (a.ndim - 1))
        return jnp.moveaxis(a.reshape(turns, lanes, *a.shape[1:]), 1, -1)

    rows = [s.reshape(-1), *(a.reshape(-1, points.tile) for a in (t, v) if a is not None)]
    count = rows[0].shape[0]
    lanes = min(count, _LANES.get(jax.default_backend(), _LANES_DEVICE))
    turns = -(-count // lanes)
    return lax.map(some, tuple(planes(a) for a in rows)).reshape(-1)[:count].reshape(s.shape)
