"""Whole models: what is saved comes back, and what is wrong with a folder or a file is said in one line."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import random_params

import qjax
from qjax.errors import UserError
from qjax.io import atomic
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_write import tensor_order
from qjax.io.huggingface import open_model
from qjax.io.rope_rows import to_halves, to_pairs
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.model import Model
from qjax.tensor import is_qtensor

FAMILIES = {
    "llama": {},
    "llama3": {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), "head_dim": 32},
    "mistral": {"family": "mistral", "window": 16},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tied": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(params=FAMILIES)
def model(request, llama_model, bpe):
    config = dataclasses.replace(llama_model.config, **FAMILIES[request.param])
    return Model(config, random_params(config), bpe)


def test_round_trip(model, tmp_path, varied_text):
    for target in ("m.gguf", "folder"):
        qjax.save(model, tmp_path / target)
        back = qjax.load(tmp_path / target)
        assert back.config == model.config
        equal(back.params, model.params)
        assert back.tokenizer.encode(varied_text) == model.tokenizer.encode(varied_text)
        assert back.tokenizer.to_gguf(model.config.vocab) == model.tokenizer.to_gguf(model.config.vocab)
    assert sorted(os.listdir(tmp_path)) == ["folder", "m.gguf"]


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_half_precision(llama_model, tmp_path, dtype, kind):
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), llama_model.params)
    qjax.save(llama_model, tmp_path / "folder", dtype=dtype)
    equal(qjax.load(tmp_path / "folder").params, rounded)
    stored = qjax.load(tmp_path / "folder", dtype=None).params
    assert {str(x.dtype) for x in jax.tree.leaves(stored)} == {dtype}
    qjax.save(llama_model, tmp_path / "m.gguf", dtype=dtype)
    file, params = read_gguf(tmp_path / "m.gguf"), qjax.load(tmp_path / "m.gguf").params
    assert file.tensors["blk.0.attn_q.weight"].type == kind and file.tensors["output_norm.weight"].type == "F32"
    assert file.metadata["general.file_type"] == {"BF16": 32, "F16": 1}[kind]
    equal(params["layers_0"]["attn"], rounded["layers_0"]["attn"])
    equal(params["final_norm"], llama_model.params["final_norm"])
    with pytest.raises(UserError, match="'int8' is not supported"):
        qjax.save(llama_model, tmp_path / "m.gguf", dtype="int8")


def pack(model, name="Q8_0"):
    def leaf(path, x):
        if x.ndim != 2:
            return x
        return qjax.quantize(x, name, axis=-1 if path[-1].key == "embedding" else 0)

    return Model(model.config, jax.tree_util.tree_map_with_path(leaf, model.params), model.tokenizer)


@pytest.mark.sampled(1)
def test_packed_weights_keep_their_bytes(model, tmp_path):
    q = pack(model)
    qjax.save(q, tmp_path / "q.gguf")
    back = qjax.load(tmp_path / "q.gguf")
    equal(back.params, q.params)
    assert is_qtensor(back.params["layers_1"]["mlp"]["down"]["kernel"])
    qjax.save(q, tmp_path / "folder")  # a folder holds floats
    equal(qjax.load(tmp_path / "folder").params, q.dense)


def test_file_is_laid_out_as_llama_quantizes(llama_model, tmp_path):
    qjax.save(pack(llama_model), tmp_path / "q.gguf", name="small")
    f = read_gguf(tmp_path / "q.gguf")
    assert list(f.tensors) == sorted(f.tensors, key=tensor_order)
    expected = {"general.quantization_version": 2, "general.file_type": 7, "general.name": "small"}
    assert expected.items() <= f.metadata.items()
    assert all(e.type == ("Q8_0" if len(e.shape) == 2 else "F32") for e in f.tensors.values())


def test_rope_rows_move_whole_rows(rng):
    rows = rng.standard_normal((3 * 8, 5))
    pairs = to_pairs(rows, 3)
    np.testing.assert_array_equal(to_halves(pairs, 3), rows)
    for head, i, s in [(0, 0, 0), (1, 2, 1), (2, 3, 0)]:
        np.testing.assert_array_equal(pairs[head * 8 + 2 * i + s], rows[head * 8 + i + s * 4])
    with_blocks = np.arange(24 * 2 * 3).reshape(24, 2, 3)
    np.testing.assert_array_equal(to_halves(to_pairs(with_blocks, 3), 3), with_blocks)


def test_what_gguf_cannot_hold(llama_model, tmp_path):
    path, where = tmp_path / "m.gguf", "layers_0/attn/q/kernel"
    params = jax.tree.map(lambda x: x, llama_model.params)
    cases = {
        "no tokenizer": dataclasses.replace(llama_model, tokenizer=None),
        "packed along axis -1": dataclasses.replace(
            llama_model, params=_with(params, qjax.quantize(np.ones((64, 64), np.float32), "Q8_0"))
        ),
        "has shape": dataclasses.replace(llama_model, params=_with(params, jnp.zeros((64, 32)))),
        "lack": dataclasses.replace(llama_model, params={k: v for k, v in params.items() if k != "layers_0"}),
    }
    if "int4_g32" in _names():
        odd = qjax.quantize(np.ones((64, 64), np.float32), "int4_g32", axis=0)
        cases["no ggml type"] = dataclasses.replace(llama_model, params=_with(params, odd))
    for error, model in cases.items():
        with pytest.raises(UserError, match=error) as e:
            qjax.save(model, path)
        assert error in ("no tokenizer", "lack") or where in str(e.value)
    assert list(tmp_path.iterdir()) == []


def _names():
    try:
        qjax.format("int4_g32")
    except UserError:
        return ()
    return ("int4_g32",)


def _with(params, leaf):
    layer = params["layers_0"]
    return {**params, "layers_0": {**layer, "attn": {**layer["attn"], "q": {"kernel": leaf}}}}


@pytest.mark.parametrize("target", ["m.gguf", "folder"])
def test_full_disk_leaves_nothing(llama_model, tmp_path, monkeypatch, target):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        qjax.save(llama_model, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "m")
    return tmp_path / "m"


def test_bad_folders(folder):
    def fails(error):
        with pytest.raises(UserError, match=error) as e:
            qjax.load(folder)
        assert str(folder) in str(e.value) and "\n" not in str(e.value)

    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    q = "model.layers.0.self_attn.q_proj.weight"
    for change, error in [
        ({q: None}, f"'{q}' is missing"),
        ({q: np.zeros((64, 32), np.float32)}, r"has shape \[64, 32\]; config.json asks for \[64, 64\]"),
        ({q: np.zeros((64, 64), np.int8)}, "has type I8"),
        ({"model.extra": np.zeros(1, np.float32)}, "'model.extra' belongs to nothing"),
    ]:
        save_file({k: v for k, v in (weights | change).items() if v is not None}, folder / "model.safetensors")
        fails(error)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    fails("'bert' is not supported")
    (folder / "config.json").write_text("{")
    fails("not valid JSON")
    os.remove(folder / "config.json")
    fails(r"no config\.json")


def test_folder_without_tokenizer(folder):
    os.remove(folder / "tokenizer.json")
    assert qjax.load(folder).tokenizer is None


def test_buffers_and_a_tied_heads_copy_are_let_pass(llama_model, tmp_path):
    config = dataclasses.replace(llama_model.config, tied=True)
    params = {k: v for k, v in llama_model.params.items() if k != "head"}
    qjax.save(Model(config, params), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    extra = {"lm_head.weight": np.zeros((512, 64), np.float32)}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    save_file(load_file(file) | extra, file)
    equal(qjax.load(tmp_path / "m").params, params)


def test_tensors_are_read_when_asked_for(folder, monkeypatch):
    monkeypatch.setattr(np, "memmap", None)  # nothing is even mapped
    config, checkpoint = open_model(folder)
    assert isinstance(config, DecoderConfig) and checkpoint.tensors


def test_sharded_folder(folder, llama_model):
    weights = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    where = {}
    for i, part in enumerate((list(weights)[::2], list(weights)[1::2])):
        save_file({k: weights[k] for k in part}, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    equal(qjax.load(folder).params, llama_model.params)


def test_bad_gguf_models(llama_model, tmp_path):
    from qjax.io.gguf_write import TensorInfo, write_gguf

    path = tmp_path / "m.gguf"
    qjax.save(llama_model, path)
    f = read_gguf(path)

    def rewritten(change=None, meta=None):
        infos = {n: (TensorInfo(n, e.shape, e.type), f.raw(n).copy()) for n, e in f.tensors.items()}
        infos |= {i.name: (i, bytes(i.nbytes)) for i in change or ()}
        write_gguf(
            tmp_path / "bad.gguf",
            {**f.metadata, **(meta or {})},
            [i for i, _ in infos.values()],
            [d for _, d in infos.values()],
        )
        with pytest.raises(UserError) as e:
            qjax.load(tmp_path / "bad.gguf")
        assert "bad.gguf" in str(e.value) and "\n" not in str(e.value)
        return str(e.value)

    assert "has shape [64, 32]" in rewritten([TensorInfo("blk.0.attn_q.weight", (64, 32), "F32")])
    assert "'blk.0.x' belongs to nothing" in rewritten([TensorInfo("blk.0.x", (1,), "F32")])
    assert "blk.0.attn_q.weight': unknown format 'I32'" in rewritten(
        [TensorInfo("blk.0.attn_q.weight", (64, 64), "I32")]
    )
    assert "'mamba' is not supported" in rewritten(meta={"general.architecture": "mamba"})
    assert "no tensor 'blk.2.attn_norm.weight'" in rewritten(meta={"llama.block_count": 3})
    assert "'x' is not known" in rewritten(meta={"tokenizer.ggml.pre": "x"})
    raw = path.read_bytes()
    path.write_bytes(raw[:-500])
    with pytest.raises(UserError, match="truncated: tensor"):
        qjax.load(path)


def test_names(tmp_path):
    with pytest.raises(UserError, match="no such file or folder, and no built-in model"):
        qjax.load(tmp_path / "absent")
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="not a model"):
        qjax.load(tmp_path / "a.txt")


def test_llama2c(shared_data, tmp_path):
    source = shared_data / "models/stories260K"
    model = qjax.load(source / "stories260K.bin")
    assert (model.config.dim, model.config.kv_heads, model.config.tied) == (64, 4, True)
    assert model.tokenizer.decode(model.tokenizer.encode("Once upon a time")) == "Once upon a time"
    qjax.save(model, tmp_path / "folder")
    back = qjax.load(tmp_path / "folder")
    equal(back.params, model.params)
    assert back.tokenizer.encode("Lily's é \n") == model.tokenizer.encode("Lily's é \n")
    raw = (source / "stories260K.bin").read_bytes()
    for bad, error in [(raw[:-4], "asks for"), (b"\xff" * 28 + raw[28:], "makes no sense"), (b"", "0 bytes")]:
        (tmp_path / "bad.bin").write_bytes(bad)
        with pytest.raises(UserError, match=error):
            qjax.load(tmp_path / "bad.bin")
    shutil.copy(source / "stories260K.bin", tmp_path / "s.bin")
    assert qjax.load(tmp_path / "s.bin").tokenizer is None
    tokens = (source / "tok512.bin").read_bytes()
    for bad in (tokens[:-1], tokens + b"x", tokens[:4] + b"\xff" * 8 + tokens[12:]):
        (tmp_path / "tok512.bin").write_bytes(bad)
        with pytest.raises(UserError, match=r"tok512\.bin"):
            qjax.load(tmp_path / "s.bin")


@pytest.mark.slow
def test_transformers_reads_our_folder(model, tmp_path, varied_text):
    """transformers is the judge of the folder: the same ids and, within 1e-4, the same logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    qjax.save(model, tmp_path / "m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    # AutoTokenizer gives every qwen2 the pre-tokenizer of Qwen2, whatever its tokenizer.json says.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    assert tokenizer(varied_text).input_ids == model.tokenizer.encode(varied_text, bos=True)
    ids = np.array([[0, *range(7, 100, 5)]])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.logits(ids), expected, atol=1e-4 * np.abs(expected).max())
