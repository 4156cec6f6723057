"""Calibration text, cut into windows: it takes a tokenizer and a context, no weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.model import Model
from qjax.models.parts import batches
from qjax.pipeline.source import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The text a model is calibrated on.

    Attributes:
      tokens: i32[windows, context].
      heldout: the last so many windows are not used to round, only to report the loss in; where a recipe shrinks,
        `to_shrink` moves the line, and all are used.
      batch: windows a step; it does not change the result beyond float32's last digits.
      seed: of the labels drawn from the model.
    """

    tokens: np.ndarray
    heldout: int = 0
    batch: int = 8
    seed: int = 0

    @property
    def used(self) -> int:
        """Windows that make statistics."""
        return len(self.tokens) - self.heldout

    def to_shrink(self) -> Calibration:
        """The same windows, a quarter of them held out at least: to tell how far the others are to be believed.

        One window cannot be split.
        """
        n = len(self.tokens)
        return dataclasses.replace(self, heldout=min(max(self.heldout, round(HELDOUT_TO_SHRINK * n), 1), n - 1))

    @property
    def steps(self) -> list[slice]:
        """Batches of windows, none both used and held out."""
        return list(batches(len(self.tokens), self.batch, (self.used,)))


HELDOUT = 1 / 8
"""The share of the calibration windows on which losses are reported and nothing is fitted."""
HELDOUT_TO_SHRINK = 1 / 4
"""The share that tells a recipe with `shrink` how far to believe the others; all are used then."""

LIMIT = 128
"""Windows that commands take of a text, at most."""


def calibration_of(
    model_context: int, tokens: Any, *, context: int | None = None, limit: int | None = None, heldout: float = HELDOUT,
    batch: int | None = None, seed: int = 0, bos: int | None = None,
) -> Calibration:  # fmt: skip
    """Cut a text into calibration windows.

    Args:
      model_context: the model's longest window.
      tokens: the ids of the text, in order.
      context: tokens a window; None: 512, or the model's if shorter.
      limit: windows at most.
      heldout: the share of the windows that is held out, at the end; at least one window if it is not 0.
      batch: windows a step; None: about 4096 tokens.
      seed: of labels drawn from the model.
      bos: what replaces the first token of each window, where the model expects one.

    Raises:
      UserError: a text shorter than two windows (one, if nothing is held out), a window longer than the model's or
        without a token, a batch without a window.
    """
    context = min(512, model_context) if context is None else context
    if context < 1:
        raise UserError(f"calibration windows need a context of at least one token, got {context}")
    if batch is not None and batch < 1:
        raise UserError(f"a batch needs at least one window, got {batch}")
    if context > model_context:
        raise UserError(
            f"calibration windows of {context} tokens are longer than the model's context of {model_context}"
        )
    if not 0 <= heldout < 1:
        raise UserError(f"heldout is a share of the windows, from 0 to below 1; got {heldout}")
    ids = np.asarray(tokens, np.int32).reshape(-1)
    least = 1 + (heldout > 0)  # windows
    if limit is not None and limit < least:
        raise UserError(
            f"a limit of {limit} calibration windows is too low: {least} are the least"
            + (" (one to calibrate on, one held out)" if heldout else "")
        )
    count = len(ids) // context
    count = count if limit is None else min(count, limit)
    held = max(1, round(heldout * count)) if heldout else 0
    if count - held < 1:
        raise UserError(
            f"the calibration text has {len(ids)} tokens; {least} windows of {context} are the least "
            "(one to calibrate on, one held out): give more text or a shorter context"
        )
    windows = ids[: count * context].reshape(count, context).copy()
    if bos is not None:
        windows[:, 0] = bos
    return Calibration(windows, held, batch or max(1, 4096 // context), seed)


def calibration_text(model: Model | Source, text: str | Sequence[str], **options: Any) -> Calibration:
    """`calibration_of` a string, read by the tokenizer of a `Model`, or of a `Source`, which reads no weights.

    Of several texts windows are taken in turn, so that a limit leaves some of each.
    """
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer to read the calibration text with; give token ids")
    t = model.tokenizer
    texts = [text] if isinstance(text, str) else text
    ids = [t.encode(one, bos=t.add_bos) for one in texts]
    context = options.get("context") or min(512, model.config.context)
    joined = ids[0] if len(ids) == 1 else in_turn(ids, context)
    return calibration_of(model.config.context, joined, bos=t.bos if t.add_bos else None, **options)


def in_turn(texts: Sequence[Sequence[int]], context: int) -> np.ndarray:
    """Whole windows of texts, the first of each, then the second of each; what is shorter than a window is joined.

    Returns: i32[tokens]; where no text has a window, all of them in a row.
    """
    cut = [np.asarray(ids, np.int32)[: len(ids) // context * context].reshape(-1, context) for ids in texts]
    rest = np.concatenate([np.asarray(ids[len(ids) // context * context :], np.int32) for ids in texts])
    windows = [w[i] for i in range(max(map(len, cut))) for w in cut if i < len(w)]
    return np.concatenate([*windows, rest])
