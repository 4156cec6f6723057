"""KL token by token, for people: its quantiles, and the worst tokens in their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax.evaluate.perplexity import Windows

SHARES = tuple(float(s) for s in 1 - np.logspace(-0.05, -4, 32))  # ever finer towards the tail
LETTERS = 40  # of the text on either side


def kl_quantiles(kl: np.ndarray) -> list[dict[str, float]]:
    """{"quantile": a share, "kl": what the KL of so many tokens does not exceed}; none that fewer than one exceeds.

    Args:
      kl: of tokens, any shape.
    """
    kept = [share for share in SHARES if (1 - share) * kl.size >= 1]
    values = np.quantile(kl.astype(np.float64), kept)
    return [{"quantile": round(s, 6), "kl": float(f"{v:.4g}")} for s, v in zip(kept, values, strict=True)]


def worst_tokens(
    kl: np.ndarray, windows: Windows, decode: Callable[[Sequence[int]], str], count: int = 12
) -> list[dict[str, Any]]:
    """The tokens whose prediction suffered most, each in its text.

    Args:
      kl: f[windows, scored].
      windows: they were scored in.
      decode: token ids to text.
      count: so many.

    Returns: {"before", "token", "after": the text, line ends as ↵; "kl": of the prediction of the token}, the worst
      first.
    """
    rows = []
    for flat in np.argsort(-kl, axis=None, kind="stable")[:count].tolist():
        window, scored = divmod(flat, kl.shape[1])
        ids, at = windows.tokens[window].tolist(), windows.first + 1 + scored
        before, token, after = (_line(decode(part)) for part in (ids[:at], ids[at : at + 1], ids[at + 1 : at + 32]))
        rows.append({"before": before[-LETTERS:], "token": token, "after": after[:LETTERS],
                     "kl": float(f"{kl[window, scored]:.4g}")})  # fmt: skip
    return rows


def _line(text: str) -> str:
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")
