"""The published algorithms in float64 NumPy, with nothing of qjax's roundings in them."""

from collections.abc import Callable

import numpy as np

Levels = Callable[[int], np.ndarray]  # column -> its levels, [rows, count]


def nearest_level(t: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The level of each row nearest to t [rows], and how far t is from the next decision, in steps."""
    near = np.sort(np.abs(levels - t[:, None]), axis=1)
    q = np.take_along_axis(levels, np.abs(levels - t[:, None]).argmin(axis=1)[:, None], axis=1)[:, 0]
    step = np.maximum(near[:, 0] + near[:, 1], 1e-300)  # between two levels these distances add up to the step
    return q, (near[:, 1] - near[:, 0]) / step


def gptq(w: np.ndarray, H: np.ndarray, order: np.ndarray, levels_of: Levels, start=None):
    """GPTQ as published: the Cholesky factor of the inverse, columns front to back, errors sent on.

    Args:
      w: [rows, n].
      H: already damped.
      order: columns, the first one rounded first.
      levels_of: the levels of a column (numbered as in w).
      start: called with a column's place and the weights as they are then, in w's own order.

    Returns: w_hat, and each weight's margin (see `nearest_level`).
    """
    n = H.shape[0]
    U = np.linalg.cholesky(np.linalg.inv(H[np.ix_(order, order)])).T
    w, w_hat, margin = w[:, order].copy(), np.empty_like(w), np.empty_like(w)
    for i in range(n):
        if start is not None:
            now = np.empty_like(w)
            now[:, order] = w
            start(i, now)
        j = order[i]
        w_hat[:, j], margin[:, j] = nearest_level(w[:, i], levels_of(j))
        error = (w[:, i] - w_hat[:, j]) / U[i, i]
        w[:, i:] -= np.outer(error, U[i, i:])
    return w_hat, margin


def block_ldl(H: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """H = L D L^T: L with identity tiles on its diagonal and zeros above, D of tiles on the diagonal."""
    n = H.shape[0]
    L, D = np.eye(n), np.zeros((n, n))
    parts = [slice(j, j + tile) for j in range(0, n, tile)]
    for k, j in enumerate(parts):
        D[j, j] = H[j, j] - sum((L[j, i] @ D[i, i] @ L[j, i].T for i in parts[:k]), np.zeros((tile, tile)))
        for after in parts[k + 1 :]:
            rest = H[after, j] - sum((L[after, i] @ D[i, i] @ L[j, i].T for i in parts[:k]), np.zeros((tile, tile)))
            L[after, j] = rest @ np.linalg.inv(D[j, j])
    return L, D


def block_ldlq(w: np.ndarray, H: np.ndarray, tile: int, rounded: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """LDLQ over tiles of columns from the last to the first; `rounded` takes a tile's targets [rows, tile]."""
    L, _ = block_ldl(H, tile)
    w_hat, n = np.zeros_like(w), H.shape[0]
    for j in reversed(range(0, n, tile)):
        behind, here = slice(j + tile, n), slice(j, j + tile)
        w_hat[:, here] = rounded(w[:, here] + (w - w_hat)[:, behind] @ L[behind, here])
    return w_hat
