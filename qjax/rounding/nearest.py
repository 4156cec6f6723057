"""Round to nearest: every weight to its nearest level, scales by the format's own search.

scales = fit(w, v)       codes = nearest(scales, w)        v = 1, or h = E[x^2] (llama.cpp's importance matrix)
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import sound
from qjax.formats.protocol import Format
from qjax.rounding.protocol import Rounding, State
from qjax.stats import Stats


@dataclasses.dataclass(frozen=True)
class Nearest(Rounding):
    """See `nearest`."""

    weight: Literal["none", "h"] = "none"

    def __post_init__(self) -> None:
        if self.weight not in ("none", "h"):
            raise UserError(f"nearest: weight is none or h, got {self.weight!r}")

    @property
    def fits(self) -> bool:
        return True

    @property
    def nearest_codes(self) -> bool:
        return True

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"h"} if self.weight == "h" else ())

    def __call__(self, state: State, format: Format, stats: Stats) -> State:
        w = state.target
        h = stats.importance if self.weight == "h" else None
        v = None if h is None else jnp.broadcast_to(h[None, :], w.shape)
        scales, codes = sound.encode(format, w, v)
        return dataclasses.replace(state, scales=scales, codes=codes)


def nearest(weight: Literal["none", "h"] = "none") -> Nearest:
    """The first stage of every recipe: fit the scales, take the nearest codes.

    Args:
      weight: "h" minimizes sum h (w - w_hat)^2, h = E[x^2] of the input; "none" the plain squared error.
    """
    return Nearest(weight)
