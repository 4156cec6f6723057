"""How likely a model finds a text behind another: what multiple-choice tasks ask.

    score = sum_t ln q(y_t | x, y_<t)        greedy = every y_t is the most probable token

Texts pass in batches of one padded length, a few lengths in all; the padding lies behind them, where causal attention
does not see it. The head is asked at the scored positions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qjax.evaluate.blocks import network_of_decoder
from qjax.evaluate.network import batch_of, token_values
from qjax.models.parts import Parts

Pair = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[int, int], object]

SHORTEST = 32
"""Tokens of the shortest padded length; the next is twice as long."""


def continuation_scores(
    model: Parts, pairs: Sequence[Pair], progress: Progress = lambda done, total: None
) -> list[tuple[float, bool]]:
    """(score, greedy) of each pair.

    Args:
      model: a Model, packed or not, or an opened file.
      pairs: (x, y): the tokens in front, at least one, and those that are scored, at least one. What is longer than the
        model's context and one token loses its beginning, as far as that is x's.
      progress: called with (pairs done, of all).
    """
    most = model.config.context
    texts = [([*x, *y][-(most + 1) :], min(len(y), most)) for x, y in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
    lengths: dict[int, list[int]] = {}
    for n, (ids, _) in enumerate(texts):
        lengths.setdefault(_padded(len(ids) - 1, most), []).append(n)
    done = 0
    for length in sorted(lengths, reverse=True):  # what takes most memory first
        mine = lengths[length]
        size = batch_of(length, len(mine), None)
        for at in range(0, len(mine), size):
            some = mine[at : at + size]
            for n, result in zip(some, _scores(model, [texts[n] for n in some], length, size), strict=True):
                found[n] = result
            done += len(some)
            progress(done, len(texts))
    return found


def _scores(model: Parts, texts: Sequence[tuple[list[int], int]], length: int, batch: int) -> list[tuple[float, bool]]:
    """Of a batch of (tokens, how many at the end are scored)."""
    reader = network_of_decoder(model.config)
    tokens = np.zeros((len(texts), length + 1), np.int32)
    for row, (ids, _) in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    # `read` gives what the head reads at all positions but the last, which has no target.
    hidden = reader.read(model, tokens, 0, batch, lambda done, total: None)
    places = [(n, len(ids) - 1 - count, len(ids) - 1) for n, (ids, count) in enumerate(texts)]
    rows = np.concatenate([hidden[n, a:b] for n, a, b in places])
    targets = np.concatenate([tokens[n, a + 1 : b + 1] for n, a, b in places])
    scoring = reader.scoring(model, hidden.shape[-1])
    spare = _padded(len(rows), 1 << 30) - len(rows)  # few programs serve all
    rows, targets = np.pad(rows, ((0, spare), (0, 0))), np.pad(targets, (0, spare))
    values = token_values(targets[:, None], (scoring, rows[:, None]))
    values = {key: found[: len(found) - spare] for key, found in values.items()}
    ends = np.cumsum([b - a for _, a, b in places])[:-1]
    nll, top = (np.split(values[key][:, 0], ends) for key in ("nll", "top"))
    return [(-float(np.sum(s, dtype=np.float64)), bool(np.all(t))) for s, t in zip(nll, top, strict=True)]


def _padded(length: int, most: int) -> int:
    """The padded length of a text."""
    padded = SHORTEST
    while padded < length:
        padded *= 2
    return min(padded, most)
