"""Small formats by the protocol alone: a few scalar levels, lattices, a trellis over rows.

None of them is known to any rounding. What is not of the format itself, codes stored as they are, is `Toy`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.formats.tiles import round_tiles


class Toy:
    """Scales {"s": f32[*b, rows, G]}; leaves are scales and codes as they are."""

    tile = (1, 1)
    rows = 1
    block = 8
    bits_per_weight = 32.0
    scale_of_rms = 1.0

    def fit(self, w, weight=None):
        x = w.reshape(*w.shape[:-1], -1, self.block or w.shape[-1])
        return {"s": self.scale_of_rms * jnp.sqrt(jnp.mean(x * x, axis=-1))}

    def encode(self, w, weight=None):
        scales = self.fit(w, weight)
        return scales, self.nearest(scales, w)

    def nearest(self, scales, w):
        return round_tiles(self, self.columns(scales, w.shape), w)[1]

    def decode(self, scales, codes):
        B = self.basis(codes)
        *theta, _ = self.columns(scales, B[0].shape)
        return sum(jnp.repeat(t, b.shape[-1] // t.shape[-1], axis=-1) * b for t, b in zip(theta, B, strict=True))

    def columns(self, scales, shape):
        return scales["s"], None

    def store(self, scales, columns):
        return {"s": jnp.maximum(columns[0], 1e-6)}

    def pack(self, scales, codes):
        return {"codes": codes, **scales}

    def unpack(self, leaves):
        return {k: v for k, v in leaves.items() if k != "codes"}, leaves["codes"]

    def shape(self, leaves):
        return leaves["codes"].shape


@dataclasses.dataclass(frozen=True)
class Few(Toy):
    """w_hat = s levels[code], one s for a block of 8; codes u8[*b, n]."""

    levels: tuple[float, ...] = (-1.0, 0.0, 1.0)
    name: str = "few"
    bits_per_weight: float = 8.0

    def fit(self, w, weight=None):
        return {"s": 0.7 * jnp.max(jnp.abs(w.reshape(*w.shape[:-1], -1, 8)), axis=-1) / max(self.levels)}

    def round(self, columns, target, metric=None):
        s = columns[0][..., None]
        code = self._index(jnp.where(s == 0, 0.0, target / jnp.where(s == 0, 1.0, s)))
        return s * self._table()[code], code.astype(jnp.uint8)

    def basis(self, codes):
        return (self._table()[codes.astype(jnp.int32)],)

    def _table(self):
        return jnp.asarray(self.levels, jnp.float32)

    def _index(self, u):
        return jnp.argmin(jnp.abs(u[..., None] - self._table().reshape(*[1] * u.ndim, -1)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Checkerboard(Toy):
    """The lattice D_k, integers of even sum, times one s for a row; codes i32[*b, n]."""

    k: int
    scale_of_rms: float = 0.5
    name: str = "checkerboard"
    block: int = 0

    @property
    def tile(self):
        return 1, self.k

    def round(self, columns, target, metric=None):
        s = columns[0][..., None]
        q = self.level(jnp.where(s == 0, 0.0, target / jnp.where(s == 0, 1.0, s)))
        return s * q, q.astype(jnp.int32)

    def basis(self, codes):
        return (codes.astype(jnp.float32),)

    def level(self, u):
        """Conway and Sloane: round each coordinate; where the sum is odd, the least certain one the other way."""
        q = jnp.round(u)
        off = u - q
        worst = lax.broadcasted_iota(jnp.int32, u.shape, u.ndim - 1) == jnp.argmax(jnp.abs(off), axis=-1, keepdims=True)
        other = q + jnp.where(worst, jnp.where(off >= 0, 1.0, -1.0), 0.0)
        odd = jnp.mod(jnp.sum(q, axis=-1, keepdims=True), 2.0) == 1.0
        return jnp.where(odd, other, q)


@dataclasses.dataclass(frozen=True)
class E8(Toy):
    """E8 in tiles of 8: D8 or D8 shifted by 1/2, the nearer in the tile's own metric; a scale for 64 weights.

    Codes: twice each coordinate, i32[*b, n].
    """

    name: str = "E8"
    block: int = 64
    tile = (1, 8)

    def round(self, columns, target, metric=None):
        s = columns[0][..., None]
        u = jnp.where(s == 0, 0.0, target / jnp.where(s == 0, 1.0, s))
        d8 = Checkerboard(8)
        points = jnp.stack([d8.level(u), d8.level(u - 0.5) + 0.5])
        e = points - u[None]
        pulled = (
            e if metric is None else jnp.einsum("pcrk,kl->pcrl", e.reshape(2, -1, 1, 8), metric, precision="highest")
        )
        miss = jnp.sum(e * pulled.reshape(e.shape), axis=-1, keepdims=True)
        q = jnp.where(miss[1] < miss[0], points[1], points[0])
        return s * q, (2 * q).astype(jnp.int32)

    def basis(self, codes):
        return (codes.astype(jnp.float32) / 2,)


@dataclasses.dataclass(frozen=True)
class Trellis(Toy):
    """A tail-biting path of one bit a weight through 2^L states over tiles of 16 x 16; a scale for 16 rows of the tile.

    State t holds the bits t ... t + L - 1 of a ring of 256, and its value is a fixed draw from the normal distribution.
    The nearest path from an arbitrary start is found, and of those that bite their tail where its middle says the
    nearest (QTIP, arXiv:2406.11235, algorithm 4). Codes: the ring, u8[*b, rows, n], one bit for each weight.
    """

    L: int = 6
    name: str = "trellis"
    block: int = 16
    rows: int = 16
    bits_per_weight: float = 1.0
    tile = (16, 16)

    def fit(self, w, weight=None):
        x = w.reshape(*w.shape[:-2], -1, 16, w.shape[-1] // 16, 16)
        return {"s": jnp.sqrt(jnp.mean(x * x, axis=(-3, -1)))}  # [rows / 16, n / 16]

    def columns(self, scales, shape):
        return jnp.repeat(scales["s"], 16, axis=-2), None

    def store(self, scales, columns):
        s = columns[0]
        return {"s": jnp.maximum(s.reshape(*s.shape[:-2], -1, 16, s.shape[-1]).mean(axis=-2), 1e-6)}

    def values(self):
        return jnp.asarray(np.random.default_rng(self.L).standard_normal(2**self.L), jnp.float32)

    def round(self, columns, target, metric=None):
        s = columns[0][..., None]
        u = jnp.where(s == 0, 0.0, target / jnp.where(s == 0, 1.0, s))
        weight = jnp.ones_like(u) if metric is None else jnp.broadcast_to(jnp.diagonal(metric), u.shape)
        x, h = (a.reshape(*u.shape[:-2], 256) for a in (u, weight))
        free = self.path(x, h, None)
        middle = self._windows(jnp.roll(free, -128, axis=-1))[..., 0]
        rolled = self.path(jnp.roll(x, -128, axis=-1), jnp.roll(h, -128, axis=-1), middle)
        bits = jnp.roll(rolled, 128, axis=-1)
        value = s * self.values()[self._windows(bits)].reshape(u.shape)
        return value, bits.reshape(u.shape).astype(jnp.uint8)

    @jax.numpy_rank_promotion("allow")
    def path(self, x, h, ends):
        """Viterbi: the bits [*c, 256] of the ring of least error, if it begins and ends in states `ends`."""
        count, values = 2**self.L, self.values()
        state = jnp.arange(count)
        before = jnp.stack([state >> 1, (state >> 1) | (count >> 1)])  # the oldest bit leaves at the top
        steps = jnp.moveaxis(x, -1, 0), jnp.moveaxis(h, -1, 0)
        first = jnp.zeros((*x.shape[:-1], count)) if ends is None else jnp.where(state == ends[..., None], 0.0, 1e30)

        def step(cost, at):
            t, weight = at
            both = cost[..., before]  # [*c, 2, states]
            new = both.min(axis=-2) + weight[..., None] * (t[..., None] - values) ** 2
            return new, both.argmin(axis=-2)

        # x[0] is what the first state stands for; the ring closes where the last state's window begins with it
        start = first + steps[1][0][..., None] * (steps[0][0][..., None] - values) ** 2
        cost, choice = lax.scan(step, start, tuple(a[1:] for a in steps))
        if ends is None:
            last = cost.argmin(axis=-1)
        else:  # one more step without a weight leads back to the first state
            both = jnp.stack([ends >> 1, (ends >> 1) | (count >> 1)], axis=-1)
            pair = jnp.take_along_axis(cost, both, axis=-1)
            last = jnp.take_along_axis(both, pair.argmin(axis=-1)[..., None], axis=-1)[..., 0]

        def back(now, chose):
            old = jnp.take_along_axis(chose, now[..., None], axis=-1)[..., 0]
            return jnp.take_along_axis(before.T[now], old[..., None], axis=-1)[..., 0], now

        begin, states = lax.scan(back, last, choice, reverse=True)
        states = jnp.concatenate([begin[None], states])
        return jnp.moveaxis(states & 1, 0, -1)

    def _windows(self, bits):
        """The state at each place of the ring: its bit and the L - 1 before it."""
        return sum(jnp.roll(bits.astype(jnp.int32), k, axis=-1) << k for k in range(self.L))

    def basis(self, codes):
        *b, rows, n = codes.shape
        tiles = jnp.moveaxis(codes.reshape(*b, rows // 16, 16, n // 16, 16), -3, -2)
        values = self.values()[self._windows(tiles.reshape(*tiles.shape[:-2], 256))].reshape(tiles.shape)
        return (jnp.moveaxis(values, -2, -3).reshape(codes.shape),)


def even_integers(u: np.ndarray) -> np.ndarray:
    """The nearest point of D_n to each row of u [rows, n], by looking at all points around it."""
    n = u.shape[1]
    offsets = np.stack(np.meshgrid(*[[-1, 0, 1, 2]] * n, indexing="ij"), axis=-1).reshape(-1, n)
    points = np.floor(u)[:, None, :] + offsets[None]
    distance = ((points - u[:, None, :]) ** 2).sum(axis=-1)
    distance[points.sum(axis=-1) % 2 != 0] = np.inf
    return points[np.arange(len(u)), distance.argmin(axis=1)]
