"""Massive activations: a few channels that are thousands of times the others, at a few tokens, the same in every text.

    token t is massive in front of a block  <=>  max_c |x_tc|  >  1000 median |x|

What a model does at such a token (it draws the attention that nobody wants) does not depend on the text, so many of
them say what one says: they count as the mean of the others in a tempered H (`token_weights.py`). They are not left
out: their keys meet every token.

Source: Sun et al., "Massive Activations in Large Language Models", arXiv:2402.17762, section 2 (magnitude above 100 and
about 1000 times the median).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

TIMES = 1000.0
_LOOKED_AT = 1_000_000  # values, for the median


@dataclasses.dataclass(frozen=True)
class Massive:
    """A channel of the residual stream.

    Attributes:
      channel: its index.
      first, last: the blocks in front of which it is massive.
      times: the largest |x| over the median, in any of them.
      share: of the tokens, at most.
      positions: in the windows, the commonest first; at most four.
    """

    channel: int
    first: int
    last: int
    times: float
    share: float
    positions: tuple[int, ...] = ()

    def __str__(self) -> str:
        at = ", ".join(map(str, self.positions))
        return (
            f"massive activations: channel {self.channel} in front of blocks {self.first} to {self.last}, up to "
            f"{self.times:,.0f} times the median |x|, at {100 * self.share:.2g} % of the tokens (most at position {at})"
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """What stands in front of one block.

    Attributes:
      tokens: bool[windows, context], which are massive.
      channels: {channel: (times the median, bool[windows, context])}.
    """

    tokens: np.ndarray
    channels: dict[int, tuple[float, np.ndarray]]


def massive_at(x: np.ndarray) -> Found:
    """The massive tokens and channels of a residual stream f32[windows, context, dim]; a window at a time."""
    flat = x.reshape(-1)
    median = float(np.median(np.abs(flat[:: max(1, flat.size // _LOOKED_AT)])))
    tokens = np.zeros(x.shape[:2], bool)
    channels: dict[int, tuple[float, np.ndarray]] = {}
    if not median > 0:
        return Found(tokens, channels)
    for i, window in enumerate(x):
        size = np.abs(window)
        over = size > TIMES * median
        tokens[i] = over.any(axis=-1)
        for channel in np.flatnonzero(over.any(axis=0)).tolist():
            before, where = channels.get(channel, (0.0, np.zeros(x.shape[:2], bool)))
            where[i] = over[:, channel]
            channels[channel] = (max(before, float(size[:, channel].max()) / median), where)
    return Found(tokens, channels)


def summed(found: Sequence[Found]) -> tuple[Massive, ...]:
    """One line a channel, of what stands in front of each block."""
    lines = []
    for channel in sorted({c for f in found for c in f.channels}):
        at = [(i, *f.channels[channel]) for i, f in enumerate(found) if channel in f.channels]
        widest = max((where for *_, where in at), key=np.count_nonzero)
        often = np.count_nonzero(widest, axis=0)
        positions = [int(p) for p in np.argsort(-often, kind="stable")[:4] if often[p]]
        times = max(times for _, times, _ in at)
        lines.append(Massive(channel, at[0][0], at[-1][0], times, float(widest.mean()), tuple(positions)))
    return tuple(sorted(lines, key=lambda line: -line.times))
