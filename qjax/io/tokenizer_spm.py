"""SentencePiece tokenizers, rebuilt for the `tokenizers` library.

SentencePiece's BPE joins, over and over, the neighbours whose union is the piece with the highest score; scores fall
with the order in which training made the pieces. So the list of all (left, right) with left + right a piece, sorted by
that piece's score, is a list of merges, and back: a piece's score is minus the rank of its first merge. Characters
without a piece become byte pieces `<0x41>`. Source: sentencepiece's bpe_model.cc and sentencepiece_model.proto.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from qjax.errors import UserError
from qjax.io.tokenizer_bpe import added_token, special_token
from qjax.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Tokenizer,
    begin_with_bos,
    check_tokens_unique,
    library_errors,
)

SPACE = "\u2581"  # how pieces spell a space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def spm_tokenizer(
    tokens: Sequence[str],
    types: Sequence[int],
    scores: Sequence[float],
    add_space_prefix: bool = True,
    *,
    bos: int | None = None,
    unk: int | None = None,
    add_bos: bool = True,
    merges: Sequence[Sequence[str]] | None = None,
    **special: Any,
) -> Tokenizer:
    """A SentencePiece tokenizer from its pieces.

    Args:
      tokens, types, scores: spelling, llama.cpp's type and score of each piece.
      add_space_prefix: a text gets a space in front.
      merges: where a file lists them; None: those that the scores make.
      special: the other special fields of Tokenizer (eos, pad, chat_template).

    Raises:
      UserError: a piece appears twice.
    """
    ids = check_tokens_unique(tokens)
    unk_token = None if unk is None else tokens[unk]
    with library_errors("tokenizer"):
        pairs = merges_of(tokens, types, scores) if merges is None else [(left, right) for left, right in merges]
        model = models.BPE(vocab=ids, merges=pairs, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if add_space_prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space_prefix else steps)
    backend.add_special_tokens(
        [special_token(t) for t, k in zip(tokens, types, strict=True) if k in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens([added_token(t) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED])
    begin_with_bos(backend, tokens, bos, add_bos)
    return Tokenizer(
        backend,
        "spm",
        tuple(tokens),
        tuple(types),
        scores=tuple(scores),
        bos=bos,
        unk=unk,
        add_bos=add_bos,
        add_space_prefix=add_space_prefix,
        **special,
    )


def merges_of(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that make the same pieces: every split of a piece into two pieces, best-scored piece first."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    begins, ends = _beginnings(ids), _beginnings(token[::-1] for token in ids)
    found = []
    for token, i in ids.items():
        tails = {len(token) - len(end) for end in ends[token[::-1]]}
        found += [(-scores[i], i, left, token[len(left) :]) for left in begins[token] if len(left) in tails]
    return [(left, right) for _, _, left, right in sorted(found)]


def _beginnings(words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which other words each word begins with, in time linear in their letters: in alphabetical order they stack."""
    found: dict[str, tuple[str, ...]] = {}
    open_: list[str] = []
    for word in sorted(words):
        while open_ and not word.startswith(open_[-1]):
            open_.pop()
        found[word] = tuple(word for word in open_ if word)
        open_.append(word)
    return found


def scores_of(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """The scores that make the same merges: minus the rank of the first merge that ends in the piece.

    Pieces that nothing merges into (letters, bytes, added tokens) score 0, which nothing asks for.
    """
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    return [-float(rank.get(token, 0)) for token in tokens]


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """The pieces of a sentencepiece `tokenizer.model`: the arguments of `spm_tokenizer`, by name.

    Raises:
      UserError: a corrupt file, or a model that is not BPE without normalization (as those of the Llama family are).
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        fields = list(_fields(raw))
        pieces = [dict(_fields(_typed(value, bytes))) for number, value in fields if number == 1]
        trainer, normalizer = (
            dict(_fields(b"".join(_typed(value, bytes) for number, value in fields if number == part)))
            for part in (2, 3)
        )
        tokens = [str(_typed(p.get(1, b""), bytes), "utf-8") for p in pieces]
        scores = [struct.unpack("<f", _typed(p.get(2, bytes(4)), bytes))[0] for p in pieces]
        types = [_typed(p.get(3, NORMAL), int) for p in pieces]
        if not all(map(math.isfinite, scores)) or not set(types) <= set(range(NORMAL, BYTE + 1)):
            raise ValueError("a piece has a score or a type that makes no sense")
    except (ValueError, struct.error) as e:
        raise UserError(f"{path}: corrupt sentencepiece model: {e}") from None
    if not pieces or trainer.get(3, 1) != 2:
        kind = {1: "unigram", 3: "word", 4: "char"}.get(trainer.get(3, 1), "empty")
        raise UserError(f"{path}: a {kind if pieces else 'empty'} sentencepiece model is not supported; expected BPE")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise UserError(
            f"{path}: the sentencepiece model normalizes its text, which is not supported; expected the identity "
            "without removal of extra whitespace"
        )
    # Fields of the trainer's record: 40 unk, 41 bos, 42 eos, 43 pad; negative numbers (none) come as 64 bits.
    default = {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    special = {name: trainer.get(40 + i, at) for i, (name, at) in enumerate(default.items())}
    found = {name: at if isinstance(at, int) and 0 <= at < len(tokens) else None for name, at in special.items()}
    return {"tokens": tokens, "types": types, "scores": scores, "add_space_prefix": bool(normalizer.get(3, 1)), **found}


def _typed(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError("a field has the wrong type")
    return value


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: ints, or bytes for everything of a length."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"unknown wire type {wire}")
        size, at = _varint(raw, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if size > len(raw) - at:
            raise ValueError("it is truncated")
        at += size
        yield number, raw[at - size : at]


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at a place, seven bits a byte, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise ValueError("it is truncated")
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")
