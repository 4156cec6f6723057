"""What gradients say at the output of every weight of a decoder, block by block: in memory, or a file a block in the
walk's folder.

    G = E[g g^T / |g|], g = dL/dy of a token: its direction, and as a weight |g|^2 to the power 1/2
    s_k = the mean of g_i^2 over the rows i of group k, token by token: GuidedQuant's

G is of the tokens that are used and of those held out. Rows of a weight stand in blocks: those of one head in q, k and
v, whose errors meet in one sum of products, and elsewhere as many as divide the height and are not more than 576.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.io.atomic import atomic_file
from qjax.io.npz import read_arrays
from qjax.lifting import Use
from qjax.typing import Array, Float

MOST = 576
"""Rows of a block, at most, for m^2 numbers are kept: SmolLM2's width."""
_HEADS = tuple(f"attn/{part}/" for part in ("q", "k", "v", "qkv", "q_b"))


class OutputCurvature:
    """{path in the block: f32[2, *b, k, m, m], of used and of held-out tokens} of every block; or, under another name,
    f32[k, windows, context] of groups of rows.

    Args:
      folder: where the files are; None: in memory.
      name: of the files.
    """

    def __init__(self, folder: Path | None = None, name: str = "output_curvature"):
        self._folder, self._name = folder, name
        self._blocks: dict[int, Mapping[str, np.ndarray]] = {}

    def put(self, block: int, of: Mapping[str, np.ndarray]) -> None:
        """Keep those of one block."""
        if self._folder is None:
            self._blocks[block] = of
            return
        with atomic_file(self._file(block)) as f:
            np.savez(f, **of)  # type: ignore[arg-type]

    def of(self, block: int) -> Mapping[str, np.ndarray]:
        """Those of one block; none where nobody has put any.

        Raises:
          UserError: a damaged file.
        """
        if self._folder is None:
            return self._blocks.get(block, {})
        return read_arrays(self._file(block))

    def _file(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}_{block}.npz"


def heights_of(uses: Iterable[Use], head: int) -> tuple[tuple[str, int], ...]:
    """(key, rows of a block) of each use, for `block_step`; of an attention head are `head`."""
    return tuple((u.key, rows_of_block(u.path, u.shape[-1 if u.axes[0] == -2 else -2], head)) for u in uses)


BY_ROWS = "row_sensitivity"


def guided_of(uses: Iterable[Use], prefix: str, guided: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """(key, groups of rows) of each matrix that is to be rounded by groups, for `block_step`.

    Args:
      prefix: of the block.
      guided: {path in the model: groups}; rows that are no such groups are left out, and their report says so.
    """
    asked = ((u, guided.get(f"{prefix}/{u.path}", 0)) for u in uses if len(u.shape) == 2 and len(u.axes) == 1)
    return tuple((u.key, k) for u, k in asked if k and u.shape[-1 if u.axes[0] == -2 else -2] % k == 0)


def rows_of_block(path: str, out: int, head: int) -> int:
    """m, the rows of a weight that are in one block.

    Args:
      path: in the piece.
      out: its rows.
      head: those of an attention head.
    """
    if path.startswith(_HEADS) and out % head == 0:
        return head
    return max(m for m in range(1, min(out, MOST) + 1) if out % m == 0)


def summed_curvature(g: Float[Array, "*b t out"], m: int) -> Float[Array, "*b k m m"]:
    """sum of g g^T / |g| over tokens; a token without gradient adds nothing."""
    size = jnp.sqrt(jnp.sum(jnp.square(g), axis=-1, keepdims=True))
    g = g / jnp.sqrt(jnp.where(size > 0, size, 1.0))
    parts = jnp.moveaxis(g.reshape(*g.shape[:-1], -1, m), -2, -3)
    batch = tuple(range(parts.ndim - 2))
    across = ((parts.ndim - 2,), (parts.ndim - 2,))
    return lax.dot_general(parts, parts, (across, (batch, batch)), precision=lax.Precision.HIGHEST)
