"""The two orders of a rotary head's rows.

Hugging Face rotates row i of a head with row i + d/2 ("halves"); llama.cpp's arch `llama` and llama2.c rotate row 2i
with row 2i + 1 ("pairs"). The same model in the other order has its q and k rows permuted within each head:

    pairs[2 i + s] = halves[i + s d / 2]

Only whole rows move, so packed rows move as they are.
"""

from __future__ import annotations

import numpy as np


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, ...] from halves to pairs."""
    d = rows.shape[0] // heads
    return rows.reshape(heads, 2, d // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def to_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * d, ...] from pairs to halves; the inverse of `to_pairs`."""
    d = rows.shape[0] // heads
    return rows.reshape(heads, d // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
