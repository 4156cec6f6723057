"""Whether weights have a layout, asked before there are any."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats.fields import Blocks
from qjax.formats.grid import Grid
from qjax.formats.protocol import Format, Leaves


def unfit(prepack: Callable[[Any, Leaves], Any], format: Format, shape: tuple[int, ...]) -> str:
    """Why `prepack` cannot take weights; "" where it can.

    Args:
      prepack: of a layout.
      format: of the weights.
      shape: theirs, (*b, rows, n).

    >>> from qjax.formats import format
    >>> from qjax.kernels.layouts import planar
    >>> unfit(planar.prepack, format("Q4_K"), (64, 512)), unfit(planar.prepack, format("Q4_K"), (512,))
    ('', 'a kernel takes a matrix (rows, columns), got Q4_K of shape (512,)')
    """
    return _unfit(prepack, format, shape)  # type: ignore[arg-type]  # a frozen record is hashable


@cache
def _unfit(prepack: Any, format: Any, shape: tuple[int, ...]) -> str:
    try:
        jax.eval_shape(partial(prepack, format), _leaves(format, shape))
    except UserError as error:
        return str(error)
    return ""


def _leaves(format: Format, shape: tuple[int, ...]) -> Leaves:
    """Shapes of the leaves of weights; those of a file's blocks without a look at their search."""
    if isinstance(format, Grid) and isinstance(format.layout, Blocks):
        layout = format.layout
        blocks = (*shape[:-1], shape[-1] // layout.block, layout.size)
        return {"blocks": jax.ShapeDtypeStruct(blocks, jnp.uint8)}
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: format.pack(*format.encode(w)), w)
