"""Byte-level BPE: the pre-tokenizers that llama.cpp knows by name, and how tokenizer.json spells them.

    text  ->  words (regular expressions, one after the other)  ->  bytes as printable letters  ->  merges, best first

A pre-tokenizer cuts text where a match of its expression begins and ends; a list of expressions cuts the pieces of
the one before. Sources: the expressions published in each model's tokenizer.json; llama.cpp's llama-vocab.cpp for
names and for which of them take a whole word from the vocabulary before any merging (`ignore_merges`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qjax.errors import UserError
from qjax.tokenizer import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Tokenizer,
    begin_with_bos,
    check_tokens_unique,
    library_errors,
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_SHORT_SPELLED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_QWEN35 = _SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class Pre:
    """A pre-tokenizer: its expressions, and whether a word found whole in the vocabulary skips the merges."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False


PRE: Mapping[str, Pre] = MappingProxyType(
    {
        "gpt-2": Pre((GPT2,)),
        "smollm": Pre((r"\p{N}", GPT2)),
        "llama-bpe": Pre((_LLAMA3,), True),
        "smaug-bpe": Pre((_LLAMA3,)),
        "qwen2": Pre((_QWEN2,)),
        "qwen35": Pre((_QWEN35,)),
        "tekken": Pre((f"{_CASED[0]}|{_CASED[1]}|" + r"\p{N}|" + _REST_SLASH,), True),
        "gpt-4o": Pre((f"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|" + r"\p{N}{1,3}|" + _REST_SLASH,)),
    }
)
# Other names under which llama.cpp runs the same expressions.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("phi-2", "olmo", "mpt", "jais", "trillion", "mellum", "modern-bert"), "gpt-2"),
        **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
        **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), "llama-bpe"),
        **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "hunyuan", "grok-2"), "qwen2"),
        **dict.fromkeys(("dbrx", "glm4", "chatglm-bpe"), "smaug-bpe"),
        "llama4": "gpt-4o",
    }
)


def bpe_tokenizer(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str],
    pre: str | None,
    *,
    bos: int | None = None,
    add_bos: bool = False,
    **special: Any,
) -> Tokenizer:
    """A byte-level BPE tokenizer from the columns of a GGUF file.

    Args:
      tokens, types: spelling (bytes as printable letters) and llama.cpp's type of each token.
      merges: "left right", best first.
      pre: llama.cpp's name of the pre-tokenizer.
      special: the other special fields of Tokenizer (eos, unk, pad, chat_template).

    Raises:
      UserError: an unknown `pre`, a token that appears twice, or a merge of unknown tokens.
    """
    known = ", ".join(PRE)
    if pre is None:
        raise UserError(f'tokenizer.ggml.pre is missing; name the pre-tokenizer, e.g. pre="gpt-2" (known: {known})')
    if ALIASES.get(pre, pre) not in PRE:
        raise UserError(f"tokenizer.ggml.pre = {pre!r} is not known; name one that splits alike with pre= ({known})")
    cut = PRE[ALIASES.get(pre, pre)]
    ids = check_tokens_unique(tokens)
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        for part in (left, right, left + right):
            if part not in ids:
                raise UserError(f"tokenizer.ggml.merges: {merge!r} names {part!r}, which is no token")
        pairs.append((left, right))
    with library_errors("tokenizer"):
        backend = Backend(models.BPE(vocab=ids, merges=pairs, ignore_merges=cut.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(e), "isolated") for e in cut.expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [special_token(t) for t, k in zip(tokens, types, strict=True) if k in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens([added_token(t) for t, k in zip(tokens, types, strict=True) if k == USER_DEFINED])
    begin_with_bos(backend, tokens, bos, add_bos)
    return Tokenizer(
        backend, "bpe", tuple(tokens), tuple(types), tuple(merges), pre=pre, bos=bos, add_bos=add_bos, **special
    )


def special_token(text: str) -> AddedToken:
    """A token that no text spells."""
    return AddedToken(text, special=True, normalized=False)


def added_token(text: str) -> AddedToken:
    """A token that is cut out of a text before anything else."""
    return AddedToken(text, special=False, normalized=False)


def pre_of(spec: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json, or None where it knows none like it."""
    expressions = _expressions(spec.get("pre_tokenizer"))
    # llama.cpp normalizes nothing; NFC, which Qwen asks for, is let pass.
    if expressions is None or spec.get("normalizer") not in (None, {"type": "NFC"}):
        return None
    made = Pre(expressions, bool(spec["model"].get("ignore_merges")))
    return next((name for name, pre in PRE.items() if pre == made), None)


def _expressions(node: Any) -> tuple[str, ...] | None:
    match node:
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            found = [_expressions(part) for part in parts]
            return None if None in found else tuple(e for part in found for e in part or ())
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return (GPT2,) if node.get("use_regex", True) else ()
        case {"type": "Digits", "individual_digits": True}:
            return (r"\p{N}",)
        case {"type": "Split", "pattern": {"Regex": str(e)}, "behavior": "Isolated", "invert": False}:
            return (e.replace(_SHORT_SPELLED, _SHORT),)
        case {"type": "Split", "pattern": {"Regex": str(e)}, "behavior": "Removed", "invert": True}:
            return (e.replace(_SHORT_SPELLED, _SHORT),)  # the same where the expression matches every character
    return None
