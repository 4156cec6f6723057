"""A Hugging Face folder streamed into GGUF is the file that llama.cpp's quantizer makes of the same model."""

import ctypes
import json

import gguf
import jax
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.io.safetensors import INDEX, SINGLE, open_file, write_file
from qjax.models.model import dense_params
from qjax.pipeline import quantize_file, quantize_params
from qjax.pipeline.source import open_source
from qjax.plan import Plan, Rule

ALL_Q8 = Plan((Rule("*", "Q8_0"),))


def read(path):
    return {t.name: (t.tensor_type.name, bytes(t.data)) for t in gguf.GGUFReader(path).tensors}


def shard(folder):
    """Split model.safetensors in two."""
    whole = open_file(folder / SINGLE)
    names = list(whole.tensors)
    arrays = {n: np.array(whole.array(n)) for n in names}
    where = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        infos = [(n, whole.tensors[n].dtype, whole.tensors[n].shape) for n in part]
        write_file(folder / file, infos, [arrays[n] for n in part])
        where |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    (folder / SINGLE).unlink()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype, sharded", [("bfloat16", False), ("float16", True), ("float32", False)])
def test_bytes_are_llama_cpps(small_model, llama_cpp, tmp_path, dtype, sharded):
    import llama_cpp as api

    qjax.save(small_model, tmp_path / "hf", dtype=dtype)
    qjax.save(qjax.load(tmp_path / "hf"), tmp_path / "f32.gguf")  # another way: decoder params, then GGUF rows
    if sharded:
        shard(tmp_path / "hf")
    report = quantize_file(tmp_path / "hf", tmp_path / "ours.gguf", "Q8_0")
    p = api.llama_model_quantize_default_params()
    p.ftype, p.nthread = 7, 1
    source, out = str(tmp_path / "f32.gguf").encode(), str(tmp_path / "theirs.gguf").encode()
    assert api.llama_model_quantize(source, out, ctypes.byref(p)) == 0
    assert read(tmp_path / "ours.gguf") == read(tmp_path / "theirs.gguf")
    assert {t.kept for t in report.tensors} == {None, "a vector"}
    ids = [0, *range(7, 200, 5)]
    a, b = llama_cpp(tmp_path / "ours.gguf"), llama_cpp(tmp_path / "theirs.gguf")
    a.eval(ids), b.eval(ids)
    np.testing.assert_array_equal(a.scores[: len(ids)], b.scores[: len(ids)])


def test_streamed_and_in_memory_weights_are_the_same(small_model, tmp_path):
    qjax.save(small_model, tmp_path / "hf")
    plan = Plan((Rule("*/attn/*/kernel", "Q4_0"), Rule("blk.1.ffn_up.weight", "keep"), Rule("*", "Q8_0")))
    in_memory = Plan((plan.rules[0], Rule("layers_1/mlp/up/kernel", "keep"), plan.rules[2]))
    streamed = quantize_file(tmp_path / "hf", tmp_path / "q.gguf", plan)
    qparams, report = quantize_params(small_model.params, in_memory)
    loaded = qjax.load(tmp_path / "q.gguf")
    jax.tree.map(np.testing.assert_array_equal, dense_params(qparams), loaded.dense)
    errors = sorted(t.error for t in report.tensors if t.error is not None)
    assert sorted(t.error for t in streamed.tensors if t.error is not None) == pytest.approx(errors, rel=1e-4)


def test_a_kept_matrix_is_permuted_like_the_others(small_model, tmp_path):
    qjax.save(small_model, tmp_path / "hf", dtype="bfloat16")
    report = quantize_file(tmp_path / "hf", tmp_path / "q.gguf", Plan((Rule("*", "keep"),)))
    expected, got = qjax.load(tmp_path / "hf"), qjax.load(tmp_path / "q.gguf")
    jax.tree.map(np.testing.assert_array_equal, expected.params, got.params)
    assert all(t.kept and t.error is None for t in report.tensors)
    assert set(report.formats) == {"BF16", "F32"}


def test_a_folder_without_tokenizer_is_named(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    with pytest.raises(UserError, match="hf: has no tokenizer"):
        quantize_file(tmp_path / "hf", tmp_path / "q.gguf", ALL_Q8)


def test_a_shrunk_file_is_named(llama_model, tmp_path):
    """A file cut after it was opened: touching pages behind its end would kill the process."""
    qjax.save(llama_model, tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    with open(tmp_path / "hf" / SINGLE, "r+b") as f:
        f.truncate(source.tensors[-1].offset + 5)
    assert source.tensors[0].read().shape == source.tensors[0].weight.shape
    with pytest.raises(UserError, match="the file is truncated"):
        source.tensors[-1].read()
