"""One call that judges a model: size, perplexity, and divergence from the model it was made from.

    baseline = baseline_of(model, text)
    rows = [judge(quantized, baseline=baseline, name=...) for quantized in ...]     # the baseline runs once

A model is in memory (`Model`) or an opened file (`qjax.pipeline.source.open_source`), and is run a part at a time: its
float32 weights never exist as a whole. Compiled programs take weights as arguments: every format of one architecture
runs the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.evaluate.divergence import (
    CACHE_BYTES,
    Baseline,
    Divergence,
    divergence,
    make_baseline,
    token_divergences,
)
from qjax.evaluate.perplexity import (
    PROTOCOLS,
    Perplexity,
    Progress,
    Windows,
    cut_windows,
    network_of_decoder,
    perplexity,
)
from qjax.evaluate.sizes import Sizes, sizes
from qjax.io.tokenizer_cut import encode_long
from qjax.models.model import Model
from qjax.models.parts import Packed, Parts

Text = str | Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What became of a model: one row of a results table.

    Attributes:
      name: the format, mix or recipe.
      perplexity, divergence, sizes: the numbers; divergence is None without a baseline.
      encode_seconds: how long quantizing took, where the caller measured it.
    """

    name: str
    sizes: Sizes
    perplexity: Perplexity
    divergence: Divergence | None = None
    encode_seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All numbers in one flat dict whose keys never change: `name`, `encode_seconds` and the parts' field names."""
        divergence = dict.fromkeys(f.name for f in dataclasses.fields(Divergence))
        if self.divergence is not None:
            divergence = dataclasses.asdict(self.divergence)
        parts = dataclasses.asdict(self.sizes) | dataclasses.asdict(self.perplexity) | divergence
        return {"name": self.name, **parts, "encode_seconds": self.encode_seconds}


def judge(
    model: Parts,
    text: Text | None = None,
    *,
    baseline: Parts | Baseline | None = None,
    protocol: str = "llama.cpp",
    context: int | None = None,
    limit: int | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
    name: str = "",
    encode_seconds: float | None = None,
) -> Judgement:
    """Judge a model on a text.

    Args:
      model: what to judge, packed or not: a Model, or an opened file.
      text: a string (the model's tokenizer reads it) or token ids. None with a Baseline: the text that one was made on.
      baseline: such a model, which then runs along, or a Baseline, which has run already (`baseline_of`). Its tokenizer
        reads the text.
      protocol: "llama.cpp" or "gptq"; see `qjax.evaluate.perplexity`.
      context: tokens a window; None: the protocol's, or the model's own if that is shorter.
      limit: judge only this many windows.
      batch: windows a step; None: about 2048 tokens.
      progress: called with (windows done, windows).
      name, encode_seconds: copied into the result.

    Raises:
      UserError: no text, no tokenizer, a text too short, a context or a token the model does not have, another
        vocabulary than the baseline's.
    """
    network = network_of_decoder(model.config)
    if isinstance(baseline, Baseline):
        if text is not None:
            raise UserError("a Baseline brings its own text; make another baseline to judge on another text")
        _check_windows(baseline.windows, model)
    else:
        if text is None:
            raise UserError("there is no text to judge the model on")
        source = model if baseline is None else baseline
        windows = windows_of(source, text, protocol=protocol, context=context, limit=limit)
        _check_windows(windows, model)
        if baseline is None:
            numbers = perplexity(network, model, windows, batch=batch, progress=progress)
            return Judgement(name, sizes_of(model), numbers, None, encode_seconds)
        baseline = Baseline(network_of_decoder(baseline.config), baseline, windows)
    numbers, distance = divergence(network, model, baseline, batch=batch, progress=progress)
    return Judgement(name, sizes_of(model), numbers, distance, encode_seconds)


def kl_by_token(
    model: Parts, baseline: Baseline, *, batch: int | None = None, progress: Progress | None = None
) -> np.ndarray:
    """KL of every scored token, nats, f32[windows, scored]; arguments as in `judge`."""
    _check_windows(baseline.windows, model)
    network = network_of_decoder(model.config)
    return token_divergences(network, model, baseline, batch=batch, progress=progress)["kl"]


def baseline_of(
    model: Parts,
    text: Text,
    *,
    protocol: str = "llama.cpp",
    context: int | None = None,
    limit: int | None = None,
    batch: int | None = None,
    cache_bytes: int = CACHE_BYTES,
    progress: Progress | None = None,
) -> Baseline:
    """Run the model others will be compared with once over a text; arguments as in `judge`.

    Args:
      cache_bytes: temporary disk space that may be used to keep its final hidden states; beyond it, it runs every time.
    """
    windows = windows_of(model, text, protocol=protocol, context=context, limit=limit)
    return make_baseline(
        network_of_decoder(model.config), model, windows,
        batch=batch, cache_bytes=cache_bytes, progress=progress,
    )  # fmt: skip


def window_divergences(model: Parts, baseline: Baseline) -> np.ndarray:
    """The mean KL of each of a baseline's windows, f64[windows]; their mean is `kl_mean` of `judge`.

    Raises:
      UserError: as `judge`.
    """
    _check_windows(baseline.windows, model)
    token = token_divergences(network_of_decoder(model.config), model, baseline)
    return token["kl"].mean(axis=1, dtype=np.float64)


def windows_of(
    model: Parts, text: Text, *, protocol: str = "llama.cpp", context: int | None = None, limit: int | None = None
) -> Windows:
    """Tokenize and cut a text as a protocol does.

    `llama.cpp` puts a BOS before the text and at the start of every window, if the tokenizer adds one; `gptq` adds
    none.
    """
    if context is None and protocol in PROTOCOLS:
        context = min(PROTOCOLS[protocol], model.config.context)
    _check_context(context, model)
    tokenizer = model.tokenizer
    bos = tokenizer.bos if tokenizer is not None and tokenizer.add_bos else None
    ids: Sequence[int] | np.ndarray
    if isinstance(text, str):
        if tokenizer is None:
            raise UserError("the model has no tokenizer; give token ids instead of text")
        # A text shorter than two windows is refused, whatever the limit.
        enough = None if limit is None or context is None else max(limit, 2) * context
        ids = encode_long(tokenizer, text, bos=protocol == "llama.cpp", limit=enough)
    else:
        ids = text
    windows = cut_windows(ids, protocol, context, bos=bos, limit=limit)
    _check_windows(windows, model)
    return windows


def _check_context(context: int | None, model: Parts) -> None:
    if context is not None and context > model.config.context:
        raise UserError(f"a context of {context} tokens is more than the model's {model.config.context}")


def _check_windows(windows: Windows, model: Parts) -> None:
    _check_context(windows.context, model)
    low, high = int(windows.tokens.min()), int(windows.tokens.max())
    if low < 0 or high >= model.config.vocab:
        bad = low if low < 0 else high
        raise UserError(f"token {bad} is outside the model's vocabulary of {model.config.vocab}")


def sizes_of(model: Parts) -> Sizes:
    """What a model's weights take, packed where they are."""
    model = model.model if isinstance(model, Packed) else model
    return sizes(model.params) if isinstance(model, Model) else model.sizes  # type: ignore[attr-defined]
