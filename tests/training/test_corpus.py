"""Token files are of the text that is trained on now; tokenizers and sizes as experiments ask for them."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.evaluate.intervals import half_interval
from qjax.training.decoder.fresh import fresh_model
from qjax.training.run.corpus import corpus_in, corpus_of, texts_of, tokenizer_in

TEXTS = ["def f(x):\n    return x + 1\n" * 20, "class A:\n    pass\n" * 20]


def letters(text):
    return [ord(c) % 64 for c in text]


def test_a_token_file_is_reused_for_the_same_text_alone(tmp_path):
    first = corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 4)
    assert first.heldout.shape == (4, 9) and first.heldout[0].tolist() == letters(TEXTS[0])[:9]
    assert corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 4).tokens == first.tokens
    with pytest.raises(UserError, match="is of another text"):
        corpus_of(letters, 64, TEXTS[::-1], TEXTS[0], tmp_path, 8, 4)
    with pytest.raises(UserError, match="a vocabulary of 64, the tokenizer one of 65"):
        corpus_of(letters, 65, TEXTS, TEXTS[0], tmp_path, 8, 4)
    with pytest.raises(UserError, match="fewer than a window of 9"):
        corpus_of(letters, 64, TEXTS, "short", tmp_path, 8, 4)
    with pytest.raises(UserError, match="at least 1 is needed to judge by, got 0"):
        corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 0)
    with pytest.raises(UserError, match="both files, or neither"):
        texts_of(tmp_path / "a", None)


@pytest.mark.parametrize("damage", ["no description", "torn description", "torn bytes", "other bytes"])
def test_damaged_tokens_are_written_again(damage, tmp_path, capsys):
    first = corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 4)
    whole, tokens, description = first.tokens.values.tobytes(), tmp_path / "tokens.bin", tmp_path / "tokens.bin.json"
    if damage == "no description":  # a kill between the two files
        description.unlink()
    elif damage == "torn description":
        description.write_bytes(b"{\xff")
    else:
        tokens.write_bytes(whole[:-2] if damage == "torn bytes" else bytes(len(whole)))
    again = corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 4)
    assert again.tokens == first.tokens and tokens.read_bytes() == whole
    assert f"writing {tokens} again" in capsys.readouterr().err


def test_a_damaged_source_or_tokenizer_is_named(tmp_path):
    tokenizer_in(tmp_path, TEXTS, 280)
    corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 4)
    (tmp_path / "tokens.source.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="is of another text"):
        corpus_of(letters, 64, TEXTS, TEXTS[0], tmp_path, 8, 4)
    (tmp_path / "tokenizer.json").write_bytes(b"{\xff")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        tokenizer_in(tmp_path, TEXTS, 280)


def test_a_tokenizer_is_trained_once(tmp_path):
    tokenizer = tokenizer_in(tmp_path, TEXTS, 280)
    again = tokenizer_in(tmp_path, ["something else"], 300)
    assert again.to_str() == tokenizer.to_str()
    corpus = corpus_in(tmp_path, tokenizer, TEXTS, TEXTS[0], 8, 4)
    assert corpus.heldout[0, 0] == tokenizer.token_to_id("<s>") == 0
    assert tokenizer.decode(corpus.heldout.reshape(-1).tolist()).startswith("def f(x):")


def test_a_fresh_model_has_the_size_and_the_seed():
    size = types.SimpleNamespace(dim=32, hidden=48, layers=2, heads=4, kv_heads=2, context=16)
    a, b, c = (fresh_model(size, 64, seed) for seed in (0, 0, 1))
    assert (a.config.head_dim, a.config.vocab, a.config.layers) == (8, 64, 2)
    embedding = [m.params["embed"]["embedding"] for m in (a, b, c)]
    np.testing.assert_array_equal(embedding[0], embedding[1])
    assert float(jnp.abs(embedding[0] - embedding[2]).max()) > 0


def test_intervals():
    assert half_interval([1.0]) is None
    assert half_interval([0.0, 1.0]) == pytest.approx(12.706 * np.sqrt(0.5) / np.sqrt(2), rel=1e-4)
    assert half_interval([float(i) for i in range(9)]) == pytest.approx(2.306 * np.std(range(9), ddof=1) / 3, rel=1e-3)
