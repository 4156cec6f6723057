"""From text to what a run reads: a token file to train on, windows to be judged by.

    corpus = corpus_of(tokenizer, texts, heldout_text, out, context=128)
    Windows(corpus.tokens, context, batch, seed).batch_at(step)        corpus.heldout  i32[n, context + 1]

Without a text of their own, runs train on the running Python's standard library and are judged by its held-out modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.errors import UserError
from qjax.io.text import read_text
from qjax.models import stdlib_text
from qjax.training.data import Tokens, open_tokens, write_tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and windows [n, context + 1] that are never trained on."""

    tokens: Tokens
    heldout: np.ndarray


def texts_of(text: Path | None, heldout: Path | None) -> tuple[list[str], str]:
    """Documents to train on and the text that judges: of files, or the standard library's.

    Raises:
      UserError: one file without the other: a text cannot judge who was trained on it.
    """
    if (text is None) != (heldout is None):
        raise UserError("text and heldout: give both files, or neither")
    if text is None or heldout is None:
        return stdlib_text.train_text(), stdlib_text.heldout_text()
    return [read_text(text)], read_text(heldout)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """GPT-2's byte-level BPE with its pre-tokenizer, which llama.cpp knows as `gpt-2`; <s> is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def corpus_of(
    encode: Any, vocab: int, texts: Iterable[str], heldout: str, out: Path, context: int, windows: int
) -> Corpus:
    """Write the token file under `out`, once, and cut the held-out windows.

    Args:
      encode: text -> token ids, BOS included where the model wants one.
      vocab: the tokenizer's size.
      texts: documents.
      heldout: the text that judges.
      context: tokens a window reads.
      windows: held-out windows at most.

    Raises:
      UserError: a held-out text shorter than a window.
    """
    path = out / "tokens.bin"
    tokens = open_tokens(path) if path.is_file() else write_tokens(path, (encode(t) for t in texts), vocab)
    ids = np.asarray(encode(heldout), np.int32)
    count = min(windows, len(ids) // (context + 1))
    if not count:
        raise UserError(f"the held-out text has {len(ids)} tokens, fewer than a window of {context + 1}")
    return Corpus(tokens, ids[: count * (context + 1)].reshape(count, context + 1))
