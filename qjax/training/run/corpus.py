"""From text to what a run reads: a token file to train on, windows to be judged by.

    corpus = corpus_for(model, name, texts_of(text, heldout), out, context, count)        of a loaded model
    corpus = corpus_in(folder, tokenizer_in(folder, texts, vocab), ...)         of one that is still to be trained
    Batches(corpus.tokens, context, batch, seed).batch_at(step)        corpus.heldout  i32[n, context + 1]

Without a text of their own, runs train on the running Python's standard library and are judged by its held-out modules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qjax.errors import UserError
from qjax.io.atomic import write_text
from qjax.io.text import read_text, read_texts
from qjax.io.tokenizer_cut import encode_long
from qjax.models import stdlib_text
from qjax.models.model import Model
from qjax.terminal import say
from qjax.training.run.data import Tokens, open_tokens, verify, write_tokens


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens to train on, and windows [n, context + 1] that are never trained on."""

    tokens: Tokens
    heldout: np.ndarray


def texts_of(text: Path | None, heldout: Path | None, characters: int = 0) -> tuple[list[str], str]:
    """Documents to train on and the text that judges: of files, or the standard library's.

    Args:
      text: to train on; a .json file holds a list of documents.
      heldout: to be judged by.
      characters: read so many of either, for a run that is only to be seen working; 0: all.

    Raises:
      UserError: one file without the other: a text cannot judge who was trained on it; a negative number.
    """
    if (text is None) != (heldout is None):
        raise UserError("text and heldout: give both files, or neither")
    if characters < 0:
        raise UserError(f"characters: how many of each text are read, 0 for all, got {characters}")
    if text is None or heldout is None:
        documents, judge = stdlib_text.train_text(), stdlib_text.heldout_text()
    else:
        documents, judge = read_texts(text), read_text(heldout)
    if not characters:
        return documents, judge
    ends = itertools.accumulate(map(len, documents), initial=0)
    cut = (d[: max(characters - before, 0)] for d, before in zip(documents, ends, strict=False))
    return [d for d in cut if d], judge[:characters]


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


def tokenizer_in(folder: Path, texts: Iterable[str], vocab: int) -> Tokenizer:
    """The tokenizer of a folder, trained and written there (as Hugging Face reads it) where there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        settings = '{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}'
        write_text(folder / "tokenizer_config.json", settings)
        write_text(path, train_tokenizer(texts, vocab).to_str())
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path} is damaged ({error}); delete it to train it again, or give another directory"
        ) from None


def corpus_in(
    folder: Path, tokenizer: Tokenizer, texts: Sequence[str], heldout: str, context: int, count: int
) -> Corpus:
    """`corpus_of` a tokenizer from `tokenizer_in`, whose documents begin with <s>."""
    return corpus_of(
        lambda text: [0, *tokenizer.encode(text).ids], tokenizer.get_vocab_size(), texts, heldout, folder, context,
        count,
    )  # fmt: skip


def corpus_for(
    model: Model, name: str, texts: tuple[Sequence[str], str], out: Path, context: int, count: int
) -> Corpus:
    """`corpus_of` the texts of `texts_of`, read by a loaded model's tokenizer.

    Raises:
      UserError: a model without a tokenizer, which the message calls `name`.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError(f"{name}: has no tokenizer to read the text with")
    return corpus_of(
        lambda text: encode_long(tokenizer, text, bos=tokenizer.add_bos), model.config.vocab, *texts, out, context,
        count,
    )  # fmt: skip


def _whole(path: Path) -> Tokens | None:
    """The tokens of a file, or None where a kill or a damage left them without the description that they fit."""
    try:
        tokens = open_tokens(path)
        verify(tokens)
        return tokens
    except UserError as error:
        say(f"{error}: writing {path} again")
        return None


def corpus_of(
    encode: Any, vocab: int, texts: Sequence[str], heldout: str, out: Path, context: int, count: int
) -> Corpus:
    """Write the token file under `out`, once, and cut the held-out windows.

    Args:
      encode: text -> token ids, BOS included where the model wants one.
      vocab: the tokenizer's size.
      texts: documents.
      heldout: the text that judges.
      context: tokens a window reads.
      count: held-out windows at most.

    Raises:
      UserError: no held-out window asked for, a held-out text shorter than one, or a token file under `out` that is of
        other documents.
    """
    if count < 1:
        raise UserError(f"held-out windows: at least 1 is needed to judge by, got {count}")
    path, source = out / "tokens.bin", out / "tokens.source.txt"
    said = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if path.is_file() and not (source.is_file() and source.read_bytes() == said.encode()):
        raise UserError(f"{path} is of another text than the one to train on now; give another directory")
    tokens = _whole(path) if path.is_file() else None
    if tokens is None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(source, said)
        tokens = write_tokens(path, (encode(t) for t in texts), vocab)
    if tokens.vocab != vocab:
        raise UserError(
            f"{path} has a vocabulary of {tokens.vocab}, the tokenizer one of {vocab}; give another directory"
        )
    ids = np.asarray(encode(heldout), np.int32)
    found = min(count, len(ids) // (context + 1))
    if not found:
        raise UserError(f"the held-out text has {len(ids)} tokens, fewer than a window of {context + 1}")
    return Corpus(tokens, ids[: found * (context + 1)].reshape(found, context + 1))
