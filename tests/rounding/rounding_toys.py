"""Two small formats: a few scalar levels, for brute force; lattices of more than one dimension, for tiles."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Few:
    """w_hat = s levels[code], one s for a block of 8. Scales {"s": f32[*b, n / 8]}; codes u8[*b, n]."""

    levels: tuple[float, ...] = (-1.0, 0.0, 1.0)
    name: str = "few"
    block: int = 8
    tile: int = 1
    bits_per_weight: float = 8.0
    row_wise: bool = True

    def fit(self, w, weight=None):
        return {"s": 0.7 * jnp.max(jnp.abs(w.reshape(*w.shape[:-1], -1, 8)), axis=-1) / max(self.levels)}

    def nearest(self, scales, w):
        u = w.reshape(*scales["s"].shape, 8) / scales["s"][..., None]
        return self._index(u).astype(jnp.uint8).reshape(w.shape)

    def decode(self, scales, codes):
        q = self._table()[codes.astype(jnp.int32)].reshape(*scales["s"].shape, 8)
        return (q * scales["s"][..., None]).reshape(codes.shape)

    def encode(self, w, weight=None):
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales, shape):
        return scales["s"], None

    def level(self, u):
        return self._table()[self._index(u)]

    def store(self, scales, s, m):
        return {"s": jnp.maximum(s, 1e-6)}

    def pack(self, scales, codes):
        return {"codes": codes, **scales}

    def unpack(self, leaves):
        return {"s": leaves["s"]}, leaves["codes"]

    def shape(self, leaves):
        return leaves["codes"].shape

    def _table(self):
        return jnp.asarray(self.levels, jnp.float32)

    def _index(self, u):
        return jnp.argmin(jnp.abs(u[..., None] - self._table().reshape(*[1] * u.ndim, -1)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Checkerboard:
    """The lattice D_tile, integers of even sum, times one s for a row. Scales {"s": f32[*b, 1]}; codes i32[*b, n]."""

    tile: int
    step: float = 0.5
    name: str = "checkerboard"
    block: int = 0
    bits_per_weight: float = 32.0
    row_wise: bool = True

    def fit(self, w, weight=None):
        return {"s": self.step * jnp.sqrt(jnp.mean(w * w, axis=-1, keepdims=True))}

    def nearest(self, scales, w):
        u = (w / scales["s"]).reshape(*w.shape[:-1], -1, self.tile)
        return self.level(u).astype(jnp.int32).reshape(w.shape)

    def decode(self, scales, codes):
        return codes.astype(jnp.float32) * scales["s"]

    def encode(self, w, weight=None):
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def grid(self, scales, shape):
        return scales["s"], None

    def level(self, u):
        """Conway and Sloane: round each coordinate; where the sum is odd, the least certain one the other way."""
        q = jnp.round(u)
        off = u - q
        worst = lax.broadcasted_iota(jnp.int32, u.shape, u.ndim - 1) == jnp.argmax(jnp.abs(off), axis=-1, keepdims=True)
        other = q + jnp.where(worst, jnp.where(off >= 0, 1.0, -1.0), 0.0)
        odd = jnp.mod(jnp.sum(q, axis=-1, keepdims=True), 2.0) == 1.0
        return jnp.where(odd, other, q)

    def store(self, scales, s, m):
        return {"s": jnp.maximum(s, 1e-6)}

    def pack(self, scales, codes):
        return {"codes": codes, **scales}

    def unpack(self, leaves):
        return {"s": leaves["s"]}, leaves["codes"]

    def shape(self, leaves):
        return leaves["codes"].shape


def even_integers(u: np.ndarray) -> np.ndarray:
    """The nearest point of D_n to each row of u [rows, n], by looking at all points around it."""
    n = u.shape[1]
    offsets = np.stack(np.meshgrid(*[[-1, 0, 1, 2]] * n, indexing="ij"), axis=-1).reshape(-1, n)
    points = np.floor(u)[:, None, :] + offsets[None]
    distance = ((points - u[:, None, :]) ** 2).sum(axis=-1)
    distance[points.sum(axis=-1) % 2 != 0] = np.inf
    return points[np.arange(len(u)), distance.argmin(axis=1)]
