"""A group's grid as the range it spans: between its ends, and how far a level's cell goes.

    low = s lo + m        high = s hi + m        s = (high - low) / (hi - lo)        m = low - s lo

lo and hi are the format's first and last unit level. Clipping (clip.py) and learned ranges (learned.py) shrink [low,
high]; a grid without an offset has one scale to shrink, and both its ends move.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats.protocol import Columns, Format
from qjax.formats.tiles import tabled
from qjax.typing import Array, Float

_FAR = 1e5  # beyond the levels of every format with scales, near enough to tell them apart by their distance
_HALVINGS = 32


def level(format: Format, u: Float[Array, "*u"]) -> Float[Array, "*u"]:
    """The unit level nearest to u, of a format of single levels under one scale: T for (w - m) / s.

    Raises:
      UserError: the format rounds several weights together, or its levels are learned.
    """
    if format.tile != (1, 1):
        tile = " x ".join(map(str, format.tile))
        raise UserError(f"{format.name} rounds {tile} weights together, and one of them alone has no levels")
    if tabled(format):
        raise UserError(f"{format.name} has levels of its own in each row, and none of a unit scale")
    value, _ = format.round((jnp.ones_like(u)[..., None], None), u[..., None, None])
    return value[..., 0, 0]


def ends(format: Format) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """lo and hi, the first and the last unit level of such a format."""
    return level(format, jnp.float32(-_FAR)), level(format, jnp.float32(_FAR))


def single(format: Format, columns: Columns) -> bool:
    """Whether levels are single numbers under one scale, so that they have ends, neighbours and a range."""
    return format.tile == (1, 1) and len(columns) == 2


def span(format: Format, s: Float[Array, "*b G"], m: Float[Array, "*b G"]) -> tuple[Array, Array]:
    """low = s lo + m and high = s hi + m of each group, f32[rows, G]."""
    lo, hi = ends(format)
    return s * lo + m, s * hi + m


def between(format: Format, low: Float[Array, "*b G"], high: Float[Array, "*b G"]) -> tuple[Array, Array]:
    """s and m of the grid whose first level lies at low and whose last at high, f32[rows, G]."""
    lo, hi = ends(format)
    s = (high - low) / (hi - lo)
    return s, low - s * lo


def shrunk(
    format: Format, columns: Columns, share: Array, range_of: Callable[[Array, Array], tuple[Array, Array]]
) -> Columns:
    """A smaller grid: all of it times `share`, or, where it has ends and an offset, with the range given for it."""
    *theta, m = columns
    if m is not None and single(format, columns):
        return range_of(theta[0], m)
    return jax.tree.map(lambda c: c * share, columns)


def grouped(w: Float[Array, "*b n"], s: Float[Array, "*b G"]) -> Float[Array, "*b G size"]:
    """The weights of each group of s."""
    return w.reshape(*s.shape, -1)


def per_weight(per_group: Float[Array, "*b G"], w: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """What a group's weights share, for each of them."""
    return jnp.broadcast_to(per_group[..., None], grouped(w, per_group).shape).reshape(w.shape)


def units(x: Float[Array, "*b G size"], s: Array, m: Array | None) -> Float[Array, "*b G size"]:
    """(x - m) / s, the argument of `level`; 0 where s is."""
    return by_inverse(x if m is None else x - m[..., None], s[..., None])


def by_inverse(x: Array, s: Array) -> Array:
    """x (1 / s) for an s that broadcasts against x, one division for many products; 0 where s is."""
    return jnp.where(s == 0, 0.0, 1.0 / jnp.where(s == 0, 1.0, s)) * x


def gap(format: Format, t: Float[Array, "*u"], up: Array) -> Float[Array, "*u"]:
    """From unit levels t to the next one, above where `up`, else below; 0 where there is none.

    `level` is all that is known of the levels: the border of t's cell is found by halving, and the next level lies as
    far behind it. Exact for levels an even step apart.
    """
    lo, hi = ends(format)
    far = jnp.where(up, hi - t, t - lo)
    side = jnp.where(up, 1.0, -1.0)

    def halve(_: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        inside, outside = now
        middle = 0.5 * (inside + outside)
        left = level(format, t + side * middle) != t
        return jnp.where(left, inside, middle), jnp.where(left, middle, outside)

    return 2 * lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(far), far))[1]
