"""A tokenizer and all that a file needs to say about it.

    text  ->  encode  ->  ids  ->  decode  ->  text

Two kinds: byte-level BPE (merges, and the regular expression that cuts text into words: `pre`) and SentencePiece
(a score for every piece). The work is done by the `tokenizers` library; this record keeps beside it what GGUF stores.
Sources: llama.cpp's llama-vocab.cpp for the GGUF keys; sentencepiece's bpe_model.cc for what scores mean.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import tokenizers
from tokenizers.processors import TemplateProcessing

from qjax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work; it must not be changed.
      kind: byte-level BPE (GGUF's model "gpt2") or SentencePiece ("llama").
      tokens: every token as the files spell it; its index is its id.
      types: llama.cpp's type of each token.
      merges: BPE's merges, "left right", best first.
      scores: SentencePiece's score of each token; the pair whose merged piece scores highest is merged first.
      pre: llama.cpp's name of the regular expression in front of BPE; None where none is known to be the same.
      bos, eos, unk, pad: special ids, or None.
      add_bos: texts begin with BOS.
      add_space_prefix: SentencePiece puts a space in front of a text.
      chat_template: the Jinja template of conversations.
    """

    backend: tokenizers.Tokenizer
    kind: Literal["bpe", "spm"]
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pre: str | None = None
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_space_prefix: bool = True
    chat_template: str | None = None

    def __post_init__(self) -> None:
        self.backend.encode_special_tokens = True  # "<s>" in a text is text

    @property
    def vocab(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
          text: any string that UTF-8 can hold.
          bos: put the BOS in front, where the model wants one (`add_bos`).
          special: read control tokens spelled out in the text ("<s>") as such, as a chat template needs; otherwise
            they are plain text.

        >>> tokenizer.encode("Once upon a time")        # doctest: +SKIP
        [403, 407, 261, 378]
        """
        backend = self._parsing if special else self.backend
        with library_errors("the tokenizer cannot read the text"):
            ids = backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if bos and self.add_bos and self.bos is not None else ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ids; control tokens are left out unless `special`."""
        with library_errors("the tokenizer cannot spell the ids"):
            return self.backend.decode(list(ids), skip_special_tokens=not special)

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.encode_special_tokens = False
        return copy

    def to_gguf(self, vocab: int | None = None) -> dict[str, Any]:
        """The `tokenizer.*` metadata of a GGUF file.

        Args:
          vocab: rows of the model's embedding; unused tokens fill the list up to it.

        Raises:
          UserError: more tokens than rows, or llama.cpp knows no pre-tokenizer like this one.
        """
        vocab = self.vocab if vocab is None else vocab
        if self.vocab > vocab:
            raise UserError(f"the tokenizer has {self.vocab} tokens, the model only {vocab} embeddings")
        if self.kind == "bpe" and self.pre is None:
            raise UserError(
                "the tokenizer's pre-tokenizer is none that qjax knows by its llama.cpp name; name the one that splits "
                'alike, e.g. qjax.save(model, path, pre="llama-bpe")'
            )
        extra = range(self.vocab, vocab)
        meta: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2" if self.kind == "bpe" else "llama",
            "tokenizer.ggml.pre": self.pre or "default",
            "tokenizer.ggml.tokens": [*self.tokens, *(f"[PAD{i}]" for i in extra)],
            "tokenizer.ggml.token_type": [*self.types, *(UNUSED for _ in extra)],
        }
        if self.kind == "bpe":
            meta["tokenizer.ggml.merges"] = list(self.merges)
        else:
            meta["tokenizer.ggml.scores"] = [*map(float, self.scores), *(-10000.0 for _ in extra)]
            meta["tokenizer.ggml.add_space_prefix"] = self.add_space_prefix
        for key, value in (("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)):
            if value is not None:
                meta[f"tokenizer.ggml.{key}_token_id"] = value
        meta["tokenizer.ggml.add_bos_token"] = self.add_bos and self.bos is not None
        meta["tokenizer.ggml.add_eos_token"] = False
        if self.chat_template is not None:
            meta["tokenizer.chat_template"] = self.chat_template
        return meta


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn what the `tokenizers` library raises into one line: plain Exceptions, and its panics, which are none."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C
        raise UserError(f"{where}: {error}") from None


def check_tokens_unique(tokens: Sequence[str]) -> dict[str, int]:
    """Token -> id, or a UserError naming the first token that appears twice."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if ids.setdefault(token, i) != i:
            raise UserError(f"tokenizer: token {token!r} appears twice, as {ids[token]} and {i}")
    return ids


def begin_with_bos(backend: tokenizers.Tokenizer, tokens: Sequence[str], bos: int | None, add_bos: bool) -> None:
    """Let the backend itself add BOS, so that its tokenizer.json says so."""
    if add_bos and bos is not None:
        token = tokens[bos]
        backend.post_processor = TemplateProcessing(
            single=f"{token} $A" if " " not in token else [token, "$A"],
            pair=f"{token} $A {token}:1 $B:1" if " " not in token else [token, "$A", token, "$B:1"],
            special_tokens=[(token, bos)],
        )
