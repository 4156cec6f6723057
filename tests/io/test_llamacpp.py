"""The real llama.cpp reads what qjax writes, splits text alike and computes the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.io.llama2c import load_llama2c
from qjax.io.tokenizer_bpe import ALIASES, PRE, bpe_tokenizer
from qjax.models.families import weight_names
from qjax.models.model import Model

IDS = [0, *range(7, 400, 5)]


def logits_of(llm, ids):
    llm.reset()
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


def quantized(model, name):
    """The model with every matrix packed; kernels along their input axis, the embedding along rows."""
    tree = {}
    for w in weight_names(model.config):
        leaf = model.params
        for key in w.path:
            leaf = leaf[key]
        node = tree
        for key in w.path[:-1]:
            node = node.setdefault(key, {})
        matrix = len(w.shape) == 2
        node[w.path[-1]] = qjax.quantize(leaf, name, axis=0 if w.transposed else -1) if matrix else leaf
    return Model(model.config, tree, model.tokenizer)


def test_float_logits_equal(small_model, llama_cpp, tmp_path):
    qjax.save(small_model, tmp_path / "m.gguf")
    theirs = logits_of(llama_cpp(tmp_path / "m.gguf"), IDS)
    ours = np.asarray(small_model.logits(np.array([IDS])))[0]
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.sampled(1)
def test_packed_file_loads_in_both(small_model, llama_cpp, tmp_path):
    """llama.cpp rounds the activations of packed matmuls to bytes, hence the tolerance; ours are exact."""
    q = quantized(small_model, "Q8_0")
    qjax.save(q, tmp_path / "q.gguf")
    ours = np.asarray(q.logits(np.array([IDS])))[0]
    theirs = logits_of(llama_cpp(tmp_path / "q.gguf"), IDS)
    assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)
    again = qjax.load(tmp_path / "q.gguf")
    np.testing.assert_array_equal(np.asarray(again.logits(np.array([IDS])))[0], ours)
    wrong = np.asarray(small_model.logits(np.array([IDS])))[0]
    assert np.linalg.norm(ours - wrong) > 1e-3 * np.linalg.norm(wrong)  # it was the packed model that ran


def test_llama_cpp_unpacks_the_same_weights(llama_model, llama_cpp, tmp_path):
    """The Q8_0 file turned to F32 by llama.cpp itself gives the logits of our decoded weights: 1e-3 relative."""
    import ctypes

    import llama_cpp as bindings

    q = quantized(llama_model, "Q8_0")
    qjax.save(q, tmp_path / "q.gguf")
    params = bindings.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = 0, True, 1
    src, dst = tmp_path / "q.gguf", tmp_path / "f.gguf"
    assert bindings.llama_model_quantize(str(src).encode(), str(dst).encode(), ctypes.byref(params)) == 0
    ours = np.asarray(q.logits(np.array([IDS])))[0]
    theirs = logits_of(llama_cpp(dst), IDS)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    back = qjax.load(dst)  # written by llama.cpp, read by us
    np.testing.assert_allclose(back.logits(np.array([IDS]))[0], ours, rtol=1e-5, atol=1e-5)


def same_ids(llm, tokenizer, text):
    for piece in [text, *text.split("\n"), "", " ", "  two", "\n\n", "a" * 50]:
        theirs = llm.tokenize(piece.encode(), add_bos=False, special=False)
        assert tokenizer.encode(piece) == theirs, repr(piece)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("pre", [*PRE, *ALIASES])
def test_bpe_ids_equal(pre, bpe_columns, llama_model, llama_cpp, tmp_path, varied_text):
    tokenizer = bpe_tokenizer(*bpe_columns, pre, bos=0, eos=1, add_bos=True)
    qjax.save(Model(llama_model.config, llama_model.params, tokenizer), tmp_path / "m.gguf")
    llm = llama_cpp(tmp_path / "m.gguf")
    same_ids(llm, tokenizer, varied_text)
    same_ids(llm, qjax.load(tmp_path / "m.gguf").tokenizer, varied_text)
    marked = "a<|im_start|>b</s>"
    assert tokenizer.encode(marked, special=True) == llm.tokenize(marked.encode(), add_bos=False, special=True)
    assert tokenizer.encode("hi", bos=True) == llm.tokenize(b"hi", add_bos=True, special=False)
    assert tokenizer.encode(marked) == llm.tokenize(marked.encode(), add_bos=False, special=False)
    assert 2 in tokenizer.encode(marked, special=True) and 2 not in tokenizer.encode(marked)


def test_stories(llama_cpp, shared_data, tmp_path, varied_text):
    """A trained model with a SentencePiece vocabulary: same ids, same loss, and it is the loss it was trained to."""
    model = load_llama2c(shared_data / "models/stories260K/stories260K.bin")
    qjax.save(model, tmp_path / "s.gguf")
    llm = llama_cpp(tmp_path / "s.gguf", n_ctx=256)
    stories = json.loads((shared_data / "text/tinystories-1000.json").read_text())[:20]
    same_ids(llm, model.tokenizer, varied_text)
    for story in stories:
        same_ids(llm, model.tokenizer, story)
    losses = []
    for story in stories:
        ids = model.tokenizer.encode(story, bos=True)[:256]
        theirs = logits_of(llm, ids)
        ours = np.asarray(model.logits(np.array([ids])))[0] if len(ids) == 256 else None
        if ours is not None:
            assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
        p = jax.nn.log_softmax(jnp.asarray(theirs))
        losses += list(-np.asarray(p)[np.arange(len(ids) - 1), ids[1:]])
    assert 1.2 < np.mean(losses) < 1.4
