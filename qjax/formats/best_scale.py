"""The best scale of a block of few whole-numbered levels, of all that there are.

    least over d of  sum v (x - d T(x / d))^2  =  sum v x^2 - (sum v x T)^2 / sum v T^2      T the nearest of -a ... b

As d falls, the level of one weight after another steps outward, that of x from k - 1 to k at d = |x| / (k - 1/2). So
there are as many sets of levels as steps: sorted, running sums give both sums of each, and the least error is read off.
With b != a the other sign of d is another such list. For trits this is the best threshold, of all |x|.
"""

from __future__ import annotations

import jax.numpy as jnp

from qjax.formats.storage import reciprocal
from qjax.typing import Array, Float

_SMALL = 1e-30


def best_scale(x: Float[Array, "*b n"], v: Float[Array, "*b n"] | None, below: int, above: int) -> Float[Array, "*b"]:
    """d of least error, before it is stored.

    Args:
      x: a block's weights.
      v: importance, not negative, or None for 1.
      below, above: a and b; 0 and 0: the levels are -1 and 1, of which the nearest is the sign at any scale.
    """
    size = jnp.abs(x)
    unit = jnp.max(size, axis=-1, keepdims=True)
    size = size * reciprocal(unit, _SMALL)
    v = jnp.ones_like(x) if v is None else v * reciprocal(jnp.max(v, axis=-1, keepdims=True))
    if not above:
        d = jnp.sum(v * size, axis=-1) * reciprocal(jnp.sum(v, axis=-1))
        return d * unit[..., 0]
    ways = [_one_sign(size, v, x > 0, below, above)]
    if below != above:
        gain, d = _one_sign(size, v, x < 0, below, above)
        ways.append((gain, -d))
    (gain, d), *other = ways
    for more, e in other:
        d = jnp.where(more > gain, e, d)
    return d * unit[..., 0]


def _one_sign(size: Array, v: Array, up: Array, below: int, above: int) -> tuple[Array, Array]:
    """What the best scale gains, (sum v x T)^2 / sum v T^2, and the scale; `up`: weights on the levels above 0."""
    steps = range(1, max(below, above) + 1)
    there = [jnp.where(up, k <= above, k <= below) & (size > 0) for k in steps]
    at = jnp.concatenate(
        [jnp.where(t, size * (1 / (k - 0.5)), 0.0) for k, t in zip(steps, there, strict=True)], axis=-1
    )
    xT = jnp.concatenate([jnp.where(t, v * size, 0.0) for t in there], axis=-1)
    TT = jnp.concatenate([jnp.where(t, (2.0 * k - 1.0) * v, 0.0) for k, t in zip(steps, there, strict=True)], axis=-1)
    order = jnp.argsort(-at, axis=-1)
    xT, TT = (jnp.cumsum(jnp.take_along_axis(a, order, axis=-1), axis=-1) for a in (xT, TT))
    d = xT * reciprocal(TT)
    best = jnp.argmax(xT * d, axis=-1)[..., None]
    gain, d = (jnp.take_along_axis(a, best, axis=-1)[..., 0] for a in (xT * d, d))
    return gain, d
