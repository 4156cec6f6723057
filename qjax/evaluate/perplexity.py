"""Perplexity of a text, streamed through one compiled program, in the two protocols results are published in.

    PPL = exp( -1/N sum_i ln p(x_i | its window so far) )

* `llama.cpp`: windows of 512 tokens, each on its own, its first token replaced by BOS where the tokenizer adds one; the
  second half is scored: the logits at positions 256 .. 510 of 512 (llama.cpp, tools/perplexity).
* `gptq`: windows of 2048 tokens, no BOS, every position with a successor is scored (GPTQ, arXiv:2210.17323, and the
  papers that follow it).

Neither protocol overlaps its windows; a rest shorter than a window is dropped. How a model is run is a matter of
`qjax.evaluate.network`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qjax.errors import UserError
from qjax.evaluate.blocks import network_of_decoder
from qjax.evaluate.network import (
    Network,
    Params,
    Progress,
    Reader,
    as_reader,
    batch_of,
    network_of_apply,
    token_values,
)
from qjax.models.parts import batches
from qjax.typing import Array

PROTOCOLS = {"llama.cpp": 512, "gptq": 2048}  # and the context each is published with


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A text cut into windows.

    Attributes:
      tokens: i32[windows, context], what the model reads.
      first: the first scored position; positions first .. context - 2 are scored.
      protocol: the name of the protocol that cut them.
    """

    tokens: np.ndarray
    first: int
    protocol: str

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    @property
    def scored(self) -> int:
        """Scored positions a window."""
        return self.context - 1 - self.first

    @property
    def targets(self) -> np.ndarray:
        """i32[windows, scored]: the token behind each scored position."""
        return self.tokens[:, self.first + 1 :]

    def __len__(self) -> int:
        return self.tokens.shape[0]


def cut_windows(
    tokens: Sequence[int] | np.ndarray,
    protocol: str = "llama.cpp",
    context: int | None = None,
    *,
    bos: int | None = None,
    limit: int | None = None,
) -> Windows:
    """Cut a token stream the way a protocol does.

    Args:
      tokens: the ids of the whole text.
      protocol: "llama.cpp" or "gptq".
      context: tokens a window; None: the protocol's own (512, 2048).
      bos: what replaces the first token of each window ("llama.cpp" only); None: nothing does.
      limit: keep only this many windows from the start.

    Raises:
      UserError: an unknown protocol, a window too short to score anything, a text too short for it.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; there are {' and '.join(PROTOCOLS)}")
    context = PROTOCOLS[protocol] if context is None else context
    if context < 4:
        raise UserError(f"a context of {context} tokens leaves nothing to score; it must be at least 4")
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} windows leaves nothing to score; it must be at least 1")
    ids = np.asarray(tokens, np.int32).reshape(-1)
    need = 2 * context if protocol == "llama.cpp" else context
    if ids.size < need:
        raise UserError(
            f"the text has {ids.size} tokens; the {protocol} protocol with a context of {context} needs at least {need}"
        )
    cut = ids[: ids.size // context * context].reshape(-1, context)[:limit].copy()
    if protocol == "gptq":
        return Windows(cut, 0, protocol)
    if bos is not None:
        cut[:, 0] = bos
    return Windows(cut, context // 2, protocol)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text and how well it is known.

    `*_se` treats tokens as independent, as llama.cpp's +- does; `*_se_clustered` treats windows as independent,
    which is the honest one, since the tokens of a window share a topic (None where there is one window only).
    """

    protocol: str
    context: int
    windows: int
    tokens_scored: int
    nll: float  # mean, nats a token
    nll_se: float
    nll_se_clustered: float | None
    perplexity: float
    perplexity_se: float


def perplexity(
    network: Reader | Callable[[Params, Array], Array],
    params: Params,
    windows: Windows,
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """exp of the mean negative log-likelihood of the scored tokens.

    Args:
      network: what reads windows: `network_of_decoder`, a Network, or a function (params, tokens [b, t]) -> logits
        [b, t, vocab].
      params: what the network takes; another tree of the same shapes reuses the compiled programs.
      windows: from `cut_windows`.
      batch: windows a step; None: about 2048 tokens. It does not change the result.
      progress: called with (windows done, windows).

    Raises:
      UserError: logits that are NaN or infinite.
    """
    reader, nll = as_reader(network), np.empty((len(windows), windows.scored), np.float32)
    for rows, hidden in readings(reader, params, windows, batch, progress):
        nll[rows] = token_values(windows.targets[rows], (reader.scoring(params, hidden.shape[-1]), hidden))["nll"]
    return perplexity_of_tokens(nll, windows)


def readings(
    reader: Reader, params: Params, windows: Windows, batch: int | None = None, progress: Progress | None = None,
    size: int | None = None,
) -> Iterator[tuple[slice, np.ndarray]]:  # fmt: skip
    """(which windows, what the head reads where they are scored): all of them, `size` or as many at a time as fit."""
    batch = batch_of(windows.context, len(windows), batch)
    for rows in batches(len(windows), size or reader.at_once(windows.context, batch)):

        def told(done: int, of: int, rows: slice = rows) -> None:
            if progress is not None:
                progress(rows.start + done, len(windows))

        yield rows, reader.read(params, windows.tokens[rows], windows.first, batch, told)


def perplexity_of_tokens(nll: np.ndarray, windows: Windows) -> Perplexity:
    """The statistics of per-token negative log-likelihoods f[windows, scored]."""
    if not np.isfinite(nll).all():
        at = int(np.argwhere(~np.isfinite(nll))[0, 0])
        raise UserError(f"the model's log-probabilities in window {at} are NaN or infinite; check its weights")
    mean, se, clustered = mean_and_errors(nll)
    ppl = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(windows.protocol, windows.context, len(windows), nll.size, mean, se, clustered, ppl, ppl * se)


def mean_and_errors(x: np.ndarray) -> tuple[float, float, float | None]:
    """Mean of x [windows, tokens]; its standard errors: over tokens, sqrt(var / (n - 1)), and over windows."""
    x = x.astype(np.float64)
    se = float(x.std() / math.sqrt(max(x.size - 1, 1)))
    clustered = None if len(x) < 2 else float(x.mean(axis=1).std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()), se, clustered


__all__ = [
    "PROTOCOLS", "Network", "Perplexity", "Progress", "Windows", "cut_windows", "mean_and_errors", "network_of_apply",
    "network_of_decoder", "perplexity", "perplexity_of_tokens", "readings",
]  # fmt: skip
