"""How much each calibration token counts in H, and how many tokens that leaves.

v_t = s_t^p        s_t = |dL/dy_t|^2 (survey.py), p the recipe's `sensitive`
effective tokens = (sum v)^2 / sum v^2        Kish, "Survey Sampling", 1965: as many alike tokens know as much
"""

from __future__ import annotations

import numpy as np


def tempered(sensitivity: np.ndarray, power: float, counted: int, alike: np.ndarray | None = None) -> np.ndarray:
    """How much each token counts: its sensitivity to a power.

    Below 1 the first position of a window and those that are massive count as the mean of the others: what a model does
    there is the same in every window, and says nothing of the text.

    Args:
      sensitivity: f32[windows, context].
      power: 1 leaves it as it is.
      counted: the windows over which the mean is 1.
      alike: bool[windows, context], the tokens that are massive; None: none.
    """
    if power == 1:
        return sensitivity
    made = sensitivity.astype(np.float64) ** power
    same = np.zeros(made.shape, bool) if alike is None else alike.copy()
    same[:, 0] = True
    others = made[:counted][~same[:counted]]
    if others.size:
        made[same] = others.mean()
    return (made / max(made[:counted].mean(), 1e-30)).astype(np.float32)


def effective(weight: np.ndarray) -> tuple[float, float]:
    """(tokens, windows) that know as much if all count alike; tokens of one window are not independent.

    Args:
      weight: f32[windows, context].
    """

    def kish(v: np.ndarray) -> float:
        return float(np.square(v.sum()) / max(np.square(v).sum(), 1e-30))

    v = weight.astype(np.float64)
    return kish(v), kish(v.sum(axis=1))
