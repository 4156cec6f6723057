"""Tokenizers of GGUF files, from the `tokenizer.*` keys of their metadata; `Tokenizer.to_gguf` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.errors import UserError
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.io.tokenizer_spm import scores_of, spm_tokenizer
from qjax.tokenizer import NORMAL, Tokenizer


def tokenizer_from_gguf(meta: Mapping[str, Any], pre: str | None = None) -> Tokenizer | None:
    """Rebuild a tokenizer from the metadata of a GGUF file; None where the file has none.

    Args:
      meta: full keys to values.
      pre: the pre-tokenizer to use in place of the file's.

    Raises:
      UserError: an unknown model or pre-tokenizer, or lists that do not fit each other; names the key.
    """
    model = meta.get("tokenizer.ggml.model")
    if model is None:
        return None
    tokens = _column(meta, "tokens", str)
    types = _column(meta, "token_type", int, len(tokens), NORMAL)
    special = {
        name: _id(meta, key, len(tokens))
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    add_bos = meta.get("tokenizer.ggml.add_bos_token")
    template = meta.get("tokenizer.chat_template")
    common: dict[str, Any] = {**special, "chat_template": template if isinstance(template, str) else None}
    if model == "gpt2":
        merges = _column(meta, "merges", str)
        pre = meta.get("tokenizer.ggml.pre") if pre is None else pre
        if not isinstance(pre, str | None):
            raise UserError("tokenizer.ggml.pre is not a name")
        made = bpe_tokenizer(tokens, types, merges, pre, add_bos=bool(add_bos), **common)
    elif model == "llama":
        scores = _column(meta, "scores", float, len(tokens), 0.0)
        defaults = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's
        common |= {k: v for k, v in defaults.items() if common[k] is None and v < len(tokens)}
        prefix = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
        made = spm_tokenizer(tokens, types, scores, prefix, add_bos=add_bos is None or bool(add_bos), **common)
    elif model == "gemma4":  # SentencePiece by its merges, as in a tokenizer.json; the scores mean nothing
        pairs = [merge.split(" ") for merge in _column(meta, "merges", str)]
        if wrong := next((pair for pair in pairs if len(pair) != 2), None):
            raise UserError(f"tokenizer.ggml.merges: {' '.join(wrong)[:40]!r} is no pair")
        made = spm_tokenizer(tokens, types, scores_of(tokens, pairs), False, add_bos=True, merges=pairs, **common)
    else:
        raise UserError(f"tokenizer.ggml.model = {str(model)[:40]!r} is not supported; supported: gpt2, llama, gemma4")
    return made


def _column(meta: Mapping[str, Any], key: str, kind: type, length: int | None = None, default: Any = None) -> list[Any]:
    key = f"tokenizer.ggml.{key}"
    values = meta.get(key)
    if values is None and default is not None:
        return [default] * (length or 0)
    if not isinstance(values, list | tuple) or any(type(v) is not kind for v in values):
        raise UserError(f"{key} is {'missing' if values is None else f'not a list of {kind.__name__}'}")
    if length is not None and len(values) != length:
        raise UserError(f"{key} has {len(values)} entries for {length} tokens")
    return list(values)


def _id(meta: Mapping[str, Any], name: str, tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = meta.get(key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < tokens:
        raise UserError(f"{key} = {str(value)[:40]!r} is no id of the {tokens} tokens")
    return value
