"""The judge that runs on the real llama.cpp against qjax's own, on the reference model."""

import os
import sys

import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.evaluate import llamacpp
from qjax.evaluate.judge import baseline_of, judge, windows_of
from qjax.io.gguf_read import read_gguf
from qjax.models import stdlib_text
from qjax.tensor import dequantize

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def reference():
    return qjax.load("reference")


@pytest.fixture(scope="module")
def windows(reference):
    return windows_of(reference, stdlib_text.heldout_text()[:4000], context=128, limit=4)


@pytest.fixture(scope="module")
def files(reference, tmp_path_factory):
    """The folder with the float model, three of its mixes made by llama.cpp, and a random imatrix in one of them."""
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    folder = tmp_path_factory.mktemp("llamacpp")
    source = folder / "f32.gguf"
    qjax.save(reference, source)
    rng = np.random.default_rng(0)
    shapes = {t.name: t.shape for t in read_gguf(source).tensors.values() if len(t.shape) > 1}
    imatrix = {name: rng.lognormal(size=shape[-1]).astype(np.float32) for name, shape in shapes.items()}
    llamacpp.quantize(source, folder / "plain.gguf", "Q4_K_M")
    llamacpp.quantize(source, folder / "imatrix.gguf", "Q4_K_M", imatrix)
    llamacpp.quantize(source, folder / "pure.gguf", "Q4_K_M", pure=True)
    return folder


@pytest.fixture(scope="module")
def llama_judge(files, windows):
    return llamacpp.judge_of(files / "f32.gguf", windows.tokens, windows.first, files)


@slow
def test_logits_are_the_models(files, windows, reference):
    ours = np.asarray(reference.logits(windows.tokens))[:, windows.first : -1]
    theirs = np.stack(list(llamacpp.logits(files / "f32.gguf", windows.tokens, windows.first)))
    assert theirs.shape == (4, 63, 4096) and theirs.dtype == np.float32
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5
    second = list(llamacpp.logits(files / "f32.gguf", windows.tokens[1:2], windows.first, threads=1))
    np.testing.assert_allclose(second[0], theirs[1], atol=1e-4)  # nothing is left of an earlier window


@slow
@pytest.mark.parametrize("name", ["plain", "imatrix", "pure"])
def test_both_judges_agree(name, files, llama_judge, windows, reference):
    theirs = llamacpp.judge_file(llama_judge, files / f"{name}.gguf")
    baseline = baseline_of(reference, windows.tokens.reshape(-1), context=128)
    np.testing.assert_array_equal(baseline.windows.tokens, windows.tokens)
    ours = judge(qjax.load(files / f"{name}.gguf"), baseline=baseline).divergence
    assert 1e-4 < theirs.kl_mean < 0.1
    for key in ("kl_mean", "kl_mean_se", "kl_p99", "base_perplexity", "rms_dp_percent"):
        assert getattr(theirs, key) == pytest.approx(getattr(ours, key), rel=0.02), key
    assert theirs.log_ratio == pytest.approx(ours.log_ratio, abs=0.02 * theirs.log_ratio_se)
    assert theirs.same_top_percent == pytest.approx(ours.same_top_percent, abs=1)


@slow
def test_a_model_against_itself(files, llama_judge):
    same = llamacpp.judge_file(llama_judge, files / "f32.gguf")
    assert abs(same.kl_max) < 1e-9 and same.same_top_percent == 100 and same.log_ratio == 0
    assert not [f for f in files.iterdir() if f.suffix != ".gguf"]  # the scratch folder is left as it was


@slow
def test_imatrix_and_pure_change_the_bytes(files):
    plain, imatrix, pure = (read_gguf(files / f"{name}.gguf") for name in ("plain", "imatrix", "pure"))
    matrices = [name for name, t in plain.tensors.items() if len(t.shape) > 1]
    types = {name: t.type for name, t in plain.tensors.items()}
    assert types == {name: t.type for name, t in imatrix.tensors.items()}
    changed = [name for name in matrices if not np.array_equal(plain.raw(name), imatrix.raw(name))]
    assert changed == matrices
    assert {pure.tensors[name].type for name in matrices if name.startswith("blk.")} == {"Q4_K"} != set(types.values())


@slow
def test_unpacking_decodes_exactly(files, tmp_path):
    llamacpp.unpack(files / "plain.gguf", tmp_path / "f32.gguf")
    packed, unpacked = read_gguf(files / "plain.gguf"), read_gguf(tmp_path / "f32.gguf")
    assert {t.type for t in unpacked.tensors.values()} == {"F32"}
    for name in ("blk.0.attn_v.weight", "blk.3.ffn_up.weight"):
        np.testing.assert_array_equal(unpacked.array(name), np.asarray(dequantize(packed.qtensor(name))))


@slow
def test_half_floats_are_unpacked_too(files, windows, reference, tmp_path):
    qjax.save(reference, tmp_path / "bf16.gguf", dtype="bfloat16")  # which is what the reference model is kept in
    made = llamacpp.judge_of(tmp_path / "bf16.gguf", windows.tokens[:1], windows.first, tmp_path)
    theirs = next(llamacpp.logits(files / "f32.gguf", windows.tokens, windows.first))
    np.testing.assert_array_equal(made.logits[0], theirs)


@slow
def test_what_cannot_be(files, windows, llama_judge, tmp_path):
    source, tokens = files / "f32.gguf", windows.tokens
    with pytest.raises(UserError, match="unknown file type 'Q9'"):
        llamacpp.quantize(source, tmp_path / "q.gguf", "Q9")
    with pytest.raises(UserError, match="another model"):
        llamacpp.quantize(source, tmp_path / "q.gguf", "Q4_0", {"blk.0.attn_q.weight": np.ones(7, np.float32)})
    with pytest.raises(UserError, match=r"cannot make .*q\.gguf.*requantizing"):
        llamacpp.quantize(files / "plain.gguf", tmp_path / "q.gguf", "Q4_0")
    with pytest.raises(UserError, match=r"cannot make .*q\.gguf.*requires an imatrix"):
        llamacpp.quantize(source, tmp_path / "q.gguf", "IQ2_XXS")
    with pytest.raises(UserError, match="no such folder"):
        llamacpp.unpack(source, tmp_path / "missing" / "q.gguf")
    with pytest.raises(UserError, match="cannot read"):
        llamacpp.judge_file(llama_judge, tmp_path / "missing.gguf")
    with pytest.raises(UserError, match=r"tokens .* vocabulary of 4096"):
        list(llamacpp.logits(source, tokens + 4000, 64))
    with pytest.raises(UserError, match="1024 tokens are more than the context"):
        list(llamacpp.logits(source, np.zeros((1, 1024), np.int32), 0))
    with pytest.raises(UserError, match="0 <= first < context - 1"):
        llamacpp.logits(source, tokens, 127)
    (tmp_path / "short.gguf").write_bytes(source.read_bytes()[:-4096])
    with pytest.raises(UserError, match="truncated"):
        list(llamacpp.logits(tmp_path / "short.gguf", tokens, 64))
    assert [f.name for f in tmp_path.iterdir()] == ["short.gguf"]


def test_no_llama_cpp(monkeypatch):
    llamacpp._library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match="install llama-cpp-python and point LLAMA_CPP_LIB_PATH"):
        llamacpp.bindings()
    llamacpp._library.cache_clear()
