"""Tokenizers against sentencepiece itself and against tokenizer.json files as models ship them."""

import json
import struct

import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from qjax.errors import UserError
from qjax.io import tokenizer_cut
from qjax.io.tokenizer_bpe import GPT2, PRE, bpe_tokenizer, pre_of
from qjax.io.tokenizer_gguf import tokenizer_from_gguf
from qjax.io.tokenizer_hf import read_tokenizer, write_tokenizer
from qjax.io.tokenizer_spm import SPACE, merges_of, read_sentencepiece, scores_of, spm_tokenizer
from qjax.tokenizer import NORMAL, Tokenizer, library_errors

ByteLevel, Split, Sequence = pre_tokenizers.ByteLevel, pre_tokenizers.Split, pre_tokenizers.Sequence


def test_round_trip(bpe, varied_text):
    for text in (varied_text, "", " ", "<s>"):
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode("a", bos=True) == [0, *bpe.encode("a")]
    assert bpe.encode("<s>") != [0] and bpe.encode("<s>", special=True) == [0]
    assert bpe.decode([0, *bpe.encode("x"), 1]) == "x" and bpe.decode([0], special=True) == "<s>"


def test_gguf_metadata_round_trip(bpe, varied_text):
    meta = bpe.to_gguf(bpe.vocab + 3)
    assert len(meta["tokenizer.ggml.tokens"]) == bpe.vocab + 3
    assert meta["tokenizer.ggml.token_type"][-3:] == [5] * 3
    again = tokenizer_from_gguf(meta)
    assert again.encode(varied_text) == bpe.encode(varied_text)
    assert (again.bos, again.eos, again.add_bos, again.pre) == (0, 1, True, "gpt-2")
    assert again.to_gguf() == meta
    assert tokenizer_from_gguf({}) is None
    with pytest.raises(UserError, match=f"{bpe.vocab} tokens, the model only 100"):
        bpe.to_gguf(100)


def test_folder_round_trip(bpe, tmp_path, varied_text):
    write_tokenizer(tmp_path, bpe)
    again = read_tokenizer(tmp_path)
    assert again.encode(varied_text) == bpe.encode(varied_text)
    assert again.to_gguf() == bpe.to_gguf()
    assert again.backend.encode("x").ids == [0, *bpe.encode("x")]  # the file itself tells other readers to add BOS
    assert read_tokenizer(tmp_path / "absent") is None


@pytest.mark.parametrize("pre", PRE)
def test_names_of_our_own_files(pre, bpe_columns):
    assert pre_of(json.loads(bpe_tokenizer(*bpe_columns, pre).backend.to_str())) == pre


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre_tokenizer", "ignore_merges", "name"),
    [
        (ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (Sequence([pre_tokenizers.Digits(True), ByteLevel(add_prefix_space=False)]), False, "smollm"),
        (Sequence([Split(Regex(LLAMA3), "isolated"), ByteLevel(False, use_regex=False)]), True, "llama-bpe"),
        (
            Sequence([Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), ByteLevel(False, use_regex=False)]),
            False,
            "qwen2",
        ),
        (Sequence([Split(Regex(GPT2), "removed", invert=True), ByteLevel(False, use_regex=False)]), False, "gpt-2"),
        (ByteLevel(add_prefix_space=True), False, None),
        (ByteLevel(add_prefix_space=False), True, None),
        (Sequence([pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False)]), False, None),
        (Sequence([Split(Regex(r"\d"), "isolated"), ByteLevel(False, use_regex=False)]), False, None),
    ],
)
def test_pre_is_recognized_by_structure(pre_tokenizer, ignore_merges, name, bpe, tmp_path, varied_text):
    spec = json.loads(bpe.backend.to_str())
    spec["pre_tokenizer"] = json.loads(pre_tokenizer.__getstate__())
    spec["model"]["ignore_merges"] = ignore_merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = read_tokenizer(tmp_path, {"bos_token_id": 0, "eos_token_id": [1, 2]})
    assert (tokenizer.pre, tokenizer.bos, tokenizer.eos) == (name, 0, 1)
    if name is None:  # it still works, but no GGUF can be written without help
        with pytest.raises(UserError, match='pre="llama-bpe"'):
            tokenizer.to_gguf()
    else:
        rebuilt = tokenizer_from_gguf(tokenizer.to_gguf())
        assert rebuilt.encode(varied_text) == tokenizer.encode(varied_text)


def test_normalizers_that_llama_cpp_lacks(bpe):
    spec = json.loads(bpe.backend.to_str())
    for normalizer, name in ((normalizers.NFC(), "gpt-2"), (normalizers.Lowercase(), None)):
        assert pre_of(spec | {"normalizer": json.loads(normalizer.__getstate__())}) == name


def test_settings_name_special_tokens(bpe, tmp_path):
    write_tokenizer(tmp_path, bpe)
    settings = {"eos_token": {"content": "<|im_start|>"}, "add_bos_token": False, "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": None}))
    tokenizer = read_tokenizer(tmp_path, {"bos_token_id": 0})
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (0, 2, False)
    assert tokenizer.to_gguf()["tokenizer.chat_template"] == "{{ x }}"
    assert tokenizer.to_gguf()["tokenizer.ggml.add_bos_token"] is False


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory, varied_text):
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text("\n".join(line for line in varied_text.replace("\r", "").split("\n") * 3 if line))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def test_sentencepiece_ids_equal(sentencepiece_file, varied_text, tmp_path):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(str(sentencepiece_file))
    ours = read_tokenizer(sentencepiece_file.parent)
    assert (ours.bos, ours.eos, ours.unk, ours.pad) == (1, 2, 0, None)
    write_tokenizer(tmp_path, ours)
    copies = [ours, tokenizer_from_gguf(ours.to_gguf()), read_tokenizer(tmp_path)]
    assert copies[2].kind == "spm"
    for text in [varied_text, *varied_text.split("\n"), "", "a", " a", "  a  b ", "日本語", "<s>", "\t\n"]:
        for ours in copies:
            assert ours.encode(text) == theirs.encode(text), repr(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("x", bos=True)[0] == 1


def test_sentencepiece_scores_survive_tokenizer_json(sentencepiece_file, tmp_path):
    """Scores come back from merges up to a monotone map, which is all that their order is used for."""
    ours = read_tokenizer(sentencepiece_file.parent)
    write_tokenizer(tmp_path, ours)
    back = read_tokenizer(tmp_path)
    assert back.types == ours.types and back.tokens == ours.tokens
    first, again = (merges_of(t.tokens, t.types, t.scores) for t in (ours, back))
    assert [a + b for a, b in first] == [a + b for a, b in again]
    merged = {a + b for a, b in first}
    at = [i for i, t in enumerate(ours.tokens) if t in merged]
    order = [np.argsort(-np.array(s)[at], kind="stable").tolist() for s in (ours.scores, scores_of(ours.tokens, first))]
    assert order[0] == order[1]


def test_gemma4s_gguf_files_hold_merges_and_no_scores():
    """Against the tokenizers library, given the same merges; the scores that stand beside them mean nothing."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    merges = ["b c", "a b", "ab c", SPACE + " a", SPACE + "a bc", "\n \n"]
    letters = [*"abc\n", SPACE]
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*control, *(f"<0x{i:02X}>" for i in range(256)), *letters, *(m.replace(" ", "") for m in merges)]
    types = [3] * 4 + [6] * 256 + [1] * (len(letters) + len(merges))
    columns = {"model": "gemma4", "tokens": tokens, "token_type": types, "merges": merges, "bos_token_id": 2}
    meta = columns | {"scores": [-1000.0] * len(tokens), "eos_token_id": 1, "unknown_token_id": 3}
    ours = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in meta.items()})
    pairs = [tuple(m.split(" ")) for m in merges]
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)}, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    theirs = Backend(model)
    theirs.normalizer = normalizers.Replace(" ", SPACE)
    theirs.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    for text in ["abc", " abc ab\n\n\nc", "aé bc", ""]:
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text
    assert ours.encode("abc", bos=True)[0] == 2 and len(ours.encode("abc")) == 2
    with pytest.raises(UserError, match="merges: 'abc' is no pair"):
        tokenizer_from_gguf({f"tokenizer.ggml.{k}": v for k, v in (columns | {"merges": ["abc"]}).items()})


def test_sentencepiece_ids_equal_llama_cpps(sentencepiece_file, llama_model, llama_cpp, tmp_path, varied_text):
    import dataclasses

    import qjax

    ours = read_tokenizer(sentencepiece_file.parent)
    qjax.save(dataclasses.replace(llama_model, tokenizer=ours), tmp_path / "m.gguf")
    llm = llama_cpp(tmp_path / "m.gguf")
    for text in [varied_text, *varied_text.split("\n"), "", "a", "  a  b ", "日本語"]:
        assert ours.encode(text) == llm.tokenize(text.encode(), add_bos=False, special=False)


def test_added_tokens_of_a_sentencepiece_folder(sentencepiece_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    added = {"480": {"content": "<|im_end|>", "special": True}, "481": {"content": "<tool>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.vocab == 482 and tokenizer.types[480:] == (3, 4)
    assert tokenizer.encode("<|im_end|>", special=True) == [480]
    assert 481 in tokenizer.encode("a<tool>b")


def test_bad_files(tmp_path, sentencepiece_file):
    raw = sentencepiece_file.read_bytes()
    bad = tmp_path / "tokenizer.model"
    rng = np.random.default_rng(0)
    for _ in range(100):
        mutated = bytearray(raw)
        for _ in range(3):
            mutated[int(rng.integers(len(raw)))] = int(rng.integers(256))
        bad.write_bytes(mutated[: int(rng.integers(len(raw)))] if rng.random() < 0.3 else mutated)
        try:
            read_sentencepiece(bad)
        except UserError as e:
            assert "\n" not in str(e)
    for text in ("[1]", "{", '{"model": 3}', '{"version": "1.0", "model": {"type": "WordPiece", "vocab": {}}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            read_tokenizer(tmp_path)


def test_unigram_is_refused(tmp_path):
    piece = b"\x0a\x01a"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a" + struct.pack("B", len(piece)) + piece)
    with pytest.raises(UserError, match="unigram sentencepiece model is not supported"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon' is not known"),
        ({"tokenizer.ggml.pre": None}, "pre is missing"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens is not a list of str"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' appears twice"),
        ({"tokenizer.ggml.token_type": [1]}, "1 entries for 4.. tokens"),
        ({"tokenizer.ggml.merges": ["q zzz"]}, "'q zzz' names 'zzz'"),
        ({"tokenizer.ggml.bos_token_id": 512}, "512' is no id"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "'x' is no id"),
    ],
)
def test_bad_metadata(bpe, change, error):
    meta = {k: v for k, v in (bpe.to_gguf() | change).items() if v is not None}
    with pytest.raises(UserError, match=error):
        tokenizer_from_gguf(meta)


def test_a_piece_of_many_letters_costs_no_more_than_its_letters():
    class Counted(str):
        cuts = 0

        def __getitem__(self, key):
            Counted.cuts += isinstance(key, slice)
            return str.__getitem__(self, key)

    tokens = [SPACE, "a", "aa", "b", "ab", Counted("a" * 4000 + "b")]
    merges = merges_of(tokens, [NORMAL] * 6, [0.0] * 6)
    assert merges == [("a", "a"), ("a", "b")] and Counted.cuts < 10  # 4000 once: every cut of every piece


def test_merges_are_all_splits_of_a_piece_into_pieces(rng):
    for _ in range(30):
        tokens = list({"".join(rng.choice(["a", "b", SPACE], rng.integers(1, 6))) for _ in range(40)})
        scores = rng.choice([0.0, -1.0, -2.0], len(tokens)).tolist()
        splits = [
            (-score, i, token[:cut], token[cut:])
            for i, (token, score) in enumerate(zip(tokens, scores, strict=True))
            for cut in range(1, len(token))
            if {token[:cut], token[cut:]} <= set(tokens)
        ]
        assert merges_of(tokens, [NORMAL] * len(tokens), scores) == [split[2:] for split in sorted(splits)]


def test_an_id_far_behind_the_others_is_refused_before_it_is_counted_up_to(bpe, tmp_path):
    spec = json.loads(bpe.backend.to_str())
    spec["model"]["vocab"]["far"] = 2**24 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"tokenizer\.json: token id 16777215 is too large for \d+ tokens"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]}},
    ],
)
def test_what_panics_in_the_library_is_refused_before_it(part, bpe, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(bpe.backend.to_str()) | part))
    with pytest.raises(UserError, match="not a tokenizer"):
        read_tokenizer(tmp_path).encode("a text")
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_of_the_library_is_a_users_error():
    class PanicException(BaseException):
        pass

    with pytest.raises(UserError, match="here: index out of bounds"), library_errors("here"):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), library_errors("here"):
        raise KeyboardInterrupt


def test_a_text_that_is_no_utf8_is_a_users_error(bpe):
    with pytest.raises(UserError, match="cannot read the text"):
        bpe.encode("\udcff")


PROSE = "x = [1, 2]  # it's  a test\n\n  def f(a, b):\n\treturn a + b\nIt was 12 o'clock and the CAT sat ok\n"


def spm(prefix=True, extra=()):
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        SPACE,
        *"abcdefghijklmnopqrstuvwxyz",
        "th",
        SPACE + "t",
        SPACE + "th",
        "at",
        *extra,
    ]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    types = [2, 3, 3] + [NORMAL] * (len(tokens) - 3) + [6] * 256
    return spm_tokenizer([*tokens, *bytes_], types, [-float(i) for i in range(len(types))], prefix, bos=1, unk=0)


@pytest.mark.parametrize("pre", [*PRE, "spm", "spm without a prefix"])
def test_long_texts_are_cut_without_a_trace(pre, bpe_columns, monkeypatch):
    monkeypatch.setattr(tokenizer_cut, "PIECE", 10)
    tokenizer = spm(pre == "spm") if pre.startswith("spm") else bpe_tokenizer(*bpe_columns, pre, bos=0, add_bos=True)
    text = PROSE * 3
    assert len(list(tokenizer_cut._pieces(tokenizer, text))) > 10
    whole = tokenizer.encode(text, bos=True)
    assert tokenizer_cut.encode_long(tokenizer, text, bos=True).tolist() == whole
    read = []
    monkeypatch.setattr(Tokenizer, "encode", lambda self, piece, bos: read.append(piece) or whole[:8])
    assert tokenizer_cut.encode_long(tokenizer, text, limit=12).tolist() == (whole[:8] * 2)[:12] and len(read) == 2


def test_texts_are_cut_only_where_it_is_exact(bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_cut, "PIECE", 10)
    across = spm(extra=("t" + SPACE, "t" + SPACE + "o"))  # pieces that reach over a space
    unknown = Tokenizer(bpe.backend, "bpe", bpe.tokens, bpe.types)  # a pre-tokenizer that llama.cpp has no name for
    for tokenizer in (across, unknown):
        assert tokenizer_cut.encode_long(tokenizer, PROSE * 2).tolist() == tokenizer.encode(PROSE * 2)
        assert len(list(tokenizer_cut._pieces(tokenizer, PROSE))) == 1
