"""Tokenizers of Hugging Face folders: tokenizer.json or tokenizer.model, with what tokenizer_config.json adds."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qjax.errors import UserError
from qjax.io.tokenizer_bpe import pre_of
from qjax.io.tokenizer_spm import BYTE_PIECE, SPACE, read_sentencepiece, scores_of, spm_tokenizer
from qjax.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Tokenizer,
    begin_with_bos,
    library_errors,
)

GAPS = 1 << 16  # ids that no token has, at most


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names it."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def read_tokenizer(folder: str | Path, config: Mapping[str, Any] | None = None) -> Tokenizer | None:
    """The tokenizer of a folder; None where it holds neither tokenizer.json nor tokenizer.model.

    Args:
      folder: holds tokenizer.json or tokenizer.model, and perhaps tokenizer_config.json and chat_template.jinja.
      config: the contents of config.json, whose bos_token_id and eos_token_id are used where nothing else names them.

    Raises:
      UserError: a corrupt file, or a kind of tokenizer that is neither byte-level BPE nor SentencePiece BPE.
    """
    folder = Path(folder)
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json", settings, config or {})
    if (folder / "tokenizer.model").is_file():
        found = read_sentencepiece(folder / "tokenizer.model")
        _add_declared_tokens(found, settings, settings_file)
        add_bos = bool(settings.get("add_bos_token", True)) and found["bos"] is not None
        return spm_tokenizer(**found, add_bos=add_bos, chat_template=_template(folder, settings))
    return None


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json and tokenizer_config.json into a folder."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, name)) is not None:
            settings[f"{name}_token"] = tokenizer.tokens[i]
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def _from_json(path: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Tokenizer:
    spec = read_json(path)
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(f"{path}: a tokenizer of type {kind!r} is not supported; expected BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):  # the first crashes the library
        if model.get(key) not in (None, "", 0):
            raise UserError(f"{path}: {key} = {model[key]!r} is not supported; expected none")
    _check_ids(spec, path)
    for node in (spec.get("normalizer"), spec.get("pre_tokenizer")):
        if (wrong := _panics(node)) is not None:
            raise UserError(f"{path}: not a tokenizer: {wrong}")
    with library_errors(f"{path}: not a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    added = {a["id"]: a for a in spec.get("added_tokens") or ()}
    spelled = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    size = max(spelled, default=-1) + 1
    kind = "spm" if model.get("byte_fallback") else "bpe"
    tokens = [spelled.get(i, f"[PAD{i}]") for i in range(size)]
    types = [_type(i, tokens[i], spelled, added, kind, model.get("unk_token")) for i in range(size)]
    special = _special(backend, settings, config, model, path.parent)
    bos = special["bos"]
    begins = bos is not None and _first_token(spec.get("post_processor")) == tokens[bos]
    add_bos = bool(settings.get("add_bos_token", begins)) and bos is not None
    if backend.post_processor is None:
        begin_with_bos(backend, tokens, bos, add_bos)
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
    common: dict[str, Any] = {**special, "add_bos": add_bos, "chat_template": _template(path.parent, settings)}
    if kind == "bpe":
        joined = tuple(" ".join(m) for m in merges)
        return Tokenizer(backend, "bpe", tuple(tokens), tuple(types), merges=joined, pre=pre_of(spec), **common)
    # llama.cpp wants the spaces of added tokens as they stand in a text.
    tokens = [t.replace(SPACE, " ") if k == USER_DEFINED else t for t, k in zip(tokens, types, strict=True)]
    scores, prefix = tuple(scores_of(tokens, merges)), _adds_space(spec)
    return Tokenizer(backend, "spm", tuple(tokens), tuple(types), scores=scores, add_space_prefix=prefix, **common)


def _check_ids(spec: Mapping[str, Any], path: Path) -> None:
    """Ids are counted up to the largest, so one that lies far behind the others would cost gigabytes."""
    vocab, added = spec["model"].get("vocab"), spec.get("added_tokens")
    added = added if isinstance(added, list) else ()
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(a.get("id") for a in added if isinstance(a, dict))]
    ids = [i for i in ids if type(i) is int]
    if max(ids, default=0) > len(ids) + GAPS:
        raise UserError(f"{path}: token id {max(ids)} is too large for {len(ids)} tokens")


def _panics(node: Any) -> str | None:
    """What is wrong with a part that makes the library panic, which no error handler keeps off the terminal."""
    match node:
        case {"type": "Sequence"}:
            parts = [
                p for key in ("normalizers", "pretokenizers") if isinstance(node.get(key), list) for p in node[key]
            ]
            return next((wrong for part in parts if (wrong := _panics(part)) is not None), None)
        case {"type": "FixedLength", "length": 0}:
            return "FixedLength cuts pieces of length 0"
        case {"type": "Precompiled"}:
            text = node.get("precompiled_charsmap")
            raw = base64.b64decode(text) if isinstance(text, str) and text.isascii() and len(text) % 4 == 0 else b""
            if len(raw) < 4 or int.from_bytes(raw[:4], "little") > len(raw) - 4:
                return "its precompiled_charsmap is cut off"
    return None


def _type(i: int, token: str, spelled, added, kind: str, unk: str | None) -> int:
    if i not in spelled:
        return UNUSED
    if kind == "spm" and token == unk:
        return UNKNOWN
    if i in added:
        return CONTROL if added[i].get("special") else USER_DEFINED
    return BYTE if kind == "spm" and BYTE_PIECE.fullmatch(token) else NORMAL


def _special(backend, settings, config, model, folder: Path) -> dict[str, int | None]:
    """The special ids: from tokenizer_config.json, else special_tokens_map.json, else config.json."""
    map_file = folder / "special_tokens_map.json"
    declared = (read_json(map_file) if map_file.is_file() else {}) | {
        k: v for k, v in settings.items() if v is not None
    }
    found: dict[str, int | None] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = declared.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        i = backend.token_to_id(token) if isinstance(token, str) else None
        if i is None:
            i = config.get(f"{name}_token_id")
            i = i[0] if isinstance(i, list) and i else i
        size = backend.get_vocab_size(with_added_tokens=True)
        found[name] = i if type(i) is int and 0 <= i < size else None
    if found["unk"] is None and isinstance(model.get("unk_token"), str):
        found["unk"] = backend.token_to_id(model["unk_token"])
    return found


def _first_token(node: Any) -> str | None:
    """The token that a tokenizer.json puts in front of every text."""
    match node:
        case {"type": "Sequence", "processors": [*parts]}:
            return next((token for part in parts if (token := _first_token(part)) is not None), None)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
    return None


def _adds_space(spec: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer.json puts a space in front of a text: in its normalizer or its Metaspace."""

    def nodes(node: Any):
        if isinstance(node, dict):
            yield node
            for key in ("normalizers", "pretokenizers"):
                for part in node.get(key) or ():
                    yield from nodes(part)

    parts = [*nodes(spec.get("normalizer")), *nodes(spec.get("pre_tokenizer"))]
    return any(
        n.get("type") == "Prepend" or (n.get("type") == "Metaspace" and n.get("prepend_scheme", "always") != "never")
        for n in parts
    )


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read {file}: {e}") from e
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _add_declared_tokens(found: dict[str, Any], settings: Mapping[str, Any], path: Path) -> None:
    """Append or retype the tokens that tokenizer_config.json adds to a tokenizer.model."""
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise UserError(f"{path}: added_tokens_decoder is not an object")
    for key, value in sorted(declared.items(), key=lambda kv: int(kv[0]) if kv[0].isdecimal() else -1):
        if not key.isdecimal() or not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise UserError(f"{path}: added_tokens_decoder[{key!r}] is not a token")
        i, size = int(key), len(found["tokens"])
        if i > size:
            raise UserError(f"{path}: added_tokens_decoder[{key!r}] leaves a gap behind the {size} tokens before it")
        if i < size and found["types"][i] == UNKNOWN:
            continue
        if i == size:
            for column, blank in (("tokens", ""), ("types", 0), ("scores", 0.0)):
                found[column].append(blank)
        found["tokens"][i] = value["content"]
        found["types"][i] = CONTROL if value.get("special") else USER_DEFINED
        found["scores"][i] = -1000.0
