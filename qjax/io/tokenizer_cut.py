"""Long texts, a piece at a time: the same ids as the whole text at once, without the records of every token at once.

    text  ->  pieces, cut in front of " y" in "x y" (x, y plain letters)  ->  ids, piece after piece

The library keeps some 150 bytes for each byte of a text that it reads. Cutting is exact where a word begins at the cut
whatever lies around it: each of llama.cpp's regular expressions in `PRE` starts a new word at a space between two
letters; SentencePiece has no words, but none of its pieces may hold a space behind another character. Where that is not
so, the text stays whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from qjax.io.tokenizer_spm import SPACE
from qjax.tokenizer import Tokenizer
from qjax.typing import Int

PIECE = 1 << 16  # characters
_WORDY = re.compile(r"^[A-Za-z]|[A-Za-z]$| ")  # an added token that may touch a cut
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")


def encode_long(tokenizer: Any, text: str, *, bos: bool = False, limit: int | None = None) -> Int[np.ndarray, "count"]:
    """`tokenizer.encode(text, bos=bos)` as i32, or its first `limit` ids, in memory that the text's length bounds.

    Args:
      tokenizer: reads the text: a Tokenizer, or anything with its `encode`, which gets the text whole.
      text: any string.
      bos: as in `Tokenizer.encode`.
      limit: ids that are enough; the rest of the text is not read.
    """
    made: list[np.ndarray] = []
    count = 0
    for number, piece in enumerate(_pieces(tokenizer, text)):
        made.append(np.asarray(tokenizer.encode(piece, bos=bos and number == 0), np.int32))
        count += len(made[-1])
        if limit is not None and count >= limit:
            break
    return np.concatenate([np.zeros(0, np.int32), *made])[:limit]


def _pieces(tokenizer: Any, text: str) -> Iterator[str]:
    if len(text) <= PIECE or not (isinstance(tokenizer, Tokenizer) and _may_cut(tokenizer)):
        yield text
        return
    # SentencePiece puts a space in front of each text by itself.
    skipped = tokenizer.kind == "spm" and tokenizer.add_space_prefix
    start = 0
    while (cut := _CUT.search(text, start + PIECE)) is not None:
        yield text[start : cut.start()]
        start = cut.start() + skipped
    yield text[start:]


def _may_cut(tokenizer: Tokenizer) -> bool:
    """Whether the ids of pieces are those of the whole."""
    added = [t for t in tokenizer.backend.get_added_tokens_decoder().values() if not t.special]
    if any(t.lstrip or t.rstrip or t.single_word or _WORDY.search(t.content) for t in added):
        return False
    if tokenizer.kind == "bpe":
        return tokenizer.pre is not None
    inner = (token for token in tokenizer.tokens if SPACE in token.lstrip(SPACE))
    return SPACE in tokenizer.tokens and next(inner, None) is None and _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> bool:
    """Whether a SentencePiece backend does nothing to a text but spell its spaces."""

    def plain(node: Any) -> bool:
        match node:
            case {"type": "Sequence", "normalizers": [*parts]}:
                return all(map(plain, parts))
            case {"type": "Prepend", "prepend": str(space)} | {"type": "Metaspace", "replacement": str(space)}:
                return space == SPACE
            case {"type": "Replace", "pattern": {"String": " "}, "content": str(space)}:
                return space == SPACE
        return False

    parts = (tokenizer.backend.normalizer, tokenizer.backend.pre_tokenizer)
    return all(plain(json.loads(part.__getstate__())) for part in parts if part is not None)
