"""What the products of all kernels share: the look at x before, and the sums that they must agree with."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats.protocol import Leaves
from qjax.typing import Array, Float


@runtime_checkable
class Packed(Protocol):
    """A matrix in any layout of a kernel."""

    @property
    def format(self) -> Format:
        """Of the weights."""

    @property
    def columns(self) -> int:
        """Of the matrix, padding not counted."""


def rows_of(x: Array, packed: Packed, words: Array, why: str) -> int:
    """Rows of x, which a kernel can take.

    Args:
      x: [m, in].
      packed: the weights.
      words: an array of theirs that has two axes where they are one matrix.
      why: what a kernel has against x's type and rows; "" for nothing.

    Raises:
      UserError: a stack of matrices, another shape of x, or `why`.
    """
    if words.ndim != 2:
        raise UserError(f"a kernel takes one matrix, got a stack of {packed.format.name}; scan over it")
    if x.ndim != 2 or x.shape[1] != packed.columns:
        raise UserError(f"a kernel of these weights takes x [m, {packed.columns}], got {list(x.shape)}")
    if why:
        raise UserError(f"the kernel does not take this x: {why}")
    return x.shape[0]


def dense(x: Float[Array, "m in"], format: Format, leaves: Leaves) -> Float[Array, "m out"]:
    """x W^T in float32, W by the format's own decode: f32[m, out]."""
    w = format.decode(*format.unpack(leaves))
    return jnp.dot(x.astype(jnp.float32), w.T, precision="highest")
