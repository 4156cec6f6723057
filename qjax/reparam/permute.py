"""Permutation: columns in another order, so that weights of like importance share a block.

    W' = W[:, order]        x' = x[order]        H' = H[order, order]

Rounding orders need none of this (ldlq's "act" leaves blocks where they are); a permutation changes what a block is.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.reparam.protocol import Applied, Reparam, Site, statistic
from qjax.typing import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=("order",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Permuted(Applied):
    """`order`, i32[n]."""

    order: Any

    def input(self, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        return jnp.take(x, self.order, axis=-1)

    def inverse(self, w: Float[Array, "out n"]) -> Float[Array, "out n"]:
        return jnp.zeros_like(w).at[:, self.order].set(w)


@dataclasses.dataclass(frozen=True)
class Permute(Reparam):
    """See `permute`."""

    by: Literal["h", "norm"] = "h"

    def __post_init__(self) -> None:
        if self.by not in ("h", "norm"):
            raise UserError(f"permute: by is h or norm, got {self.by!r}")

    @property
    def name(self) -> str:
        return "permute"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"h"} if self.by == "h" else ())

    def __call__(self, site: Site) -> tuple[Site, Permuted]:
        key = statistic(site.stats, "h", "permute") if self.by == "h" else jnp.sum(site.w * site.w, axis=0)
        order = jnp.argsort(-key).astype(jnp.int32)
        return site.moved(site.w[:, order], site.stats.permute(order)), Permuted(order)


def permute(by: Literal["h", "norm"] = "h") -> Permute:
    """Columns by descending importance h = E[x^2], or by descending norm of the weights."""
    return Permute(by)
