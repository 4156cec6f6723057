"""Learning rates as functions of the step: warm-up, constant, cooldown.

    warm-up     0 -> peak, linear            x = share of the cooldown that is over, 0 to 1
    cooldown    floor + (peak - floor) c(x)       c = 1 - x,  (1 + cos(pi x)) / 2  or  1 - sqrt(x)

The constant rate with a cooldown and the shape 1 - sqrt are from Hägele et al., arXiv:2405.18392. Rates are for the
steps 0 ... total - 1; the floor is reached at `total`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax

from qjax.errors import UserError
from qjax.typing import Array, Float

SHAPES: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
    "sqrt": lambda x: 1.0 - jnp.sqrt(x),
}


def warmup_cosine(peak: float, total: int, warmup: int, floor: float = 0.0) -> optax.Schedule:
    """From 0 to the peak in `warmup` steps, then half a cosine down to the floor at `total`.

    Raises:
      UserError: the warm-up leaves no step.
    """
    return warmup_constant_cooldown(peak, total, warmup, total - warmup, "cosine", floor)


def warmup_constant_cooldown(
    peak: float, total: int, warmup: int, cooldown: int, shape: str = "sqrt", floor: float = 0.0
) -> optax.Schedule:
    """From 0 to the peak in `warmup` steps, constant, and down to the floor in the last `cooldown` steps.

    Args:
      peak: the constant rate.
      total: steps.
      warmup: steps; 0: the first step already has the peak.
      cooldown: steps.
      shape: of the cooldown: linear, cosine or sqrt.
      floor: the rate at `total`.

    Returns: a traceable function from the step to f32[].

    Raises:
      UserError: an unknown shape, steps that do not fit into `total`, a floor above the peak.

    >>> rate = warmup_constant_cooldown(1.0, total=100, warmup=10, cooldown=20, shape="linear")
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 80, 90, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if cooldown < 1 or warmup < 0 or warmup + cooldown > total:
        raise UserError(f"warmup ({warmup}) and cooldown ({cooldown}, 1 or more) must fit into {total} steps")
    return _of_float(
        optax.join_schedules([_rise(peak, warmup), _fall(peak, cooldown, shape, floor)], [total - cooldown])
    )


def _rise(peak: float, steps: int) -> optax.Schedule:
    return optax.linear_schedule(0.0, peak, steps) if steps else optax.constant_schedule(peak)


def _fall(peak: float, steps: int, shape: str, floor: float) -> optax.Schedule:
    if shape not in SHAPES:
        raise UserError(f"no cooldown has the shape {shape!r}; there are {', '.join(SHAPES)}")
    if not 0.0 <= floor <= peak:
        raise UserError(f"the floor must lie between 0 and the peak {peak}, got {floor}")
    return lambda t: floor + (peak - floor) * SHAPES[shape](jnp.clip(t / steps, 0.0, 1.0))


def _of_float(schedule: optax.Schedule) -> Callable[..., Float[Array, ""]]:
    """The schedule on the step as f32: exact up to 2^24, and free of promotions from integers."""
    return lambda step: jnp.asarray(schedule(jnp.asarray(step, jnp.float32)), jnp.float32)
