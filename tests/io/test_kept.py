"""What a file said beside architecture, weights and tokenizer is said again by the file that is saved from it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_write import TensorInfo, write_gguf
from qjax.io.huggingface import load_folder, save_folder
from qjax.io.safetensors import open_folder
from qjax.pipeline import quantize_file

KEPT = {
    "general.name": "A small one",
    "general.license": "apache-2.0",
    "general.tags": ["tiny", "test"],
    "general.size_label": "100K",
    "general.languages": [],
    "general.base_model.count": np.uint32(1),
    "tokenizer.ggml.eot_token_id": np.uint32(2),
    "tokenizer.ggml.remove_extra_whitespaces": False,
    "tokenizer.chat_template.tool_use": "{{ tools }}",
    "a.u8": np.uint8(200),
    "a.i8": np.int8(-3),
    "a.u16": np.uint16(60000),
    "a.i16": np.int16(-300),
    "a.i32": np.int32(7),
    "a.u64": np.uint64(1 << 63),
    "a.i64": np.int64(-1),
    "a.f32": np.float32(0.1),
    "a.f64": np.float64(0.1),
    "a.bool": True,
    "a.u8s": np.array([1, 255], np.uint8),
    "a.f64s": np.array([0.1, 1e300]),
    "a.bools": np.array([True, False]),
    "a.none": np.array([], np.int16),
    "a.words": [["a", "b"], []],
}


def with_metadata(path, made, extra):
    """The same file with more metadata."""
    file = read_gguf(path)
    infos = [TensorInfo(e.name, e.shape, e.type) for e in file.tensors.values()]
    meta = {key: file.typed(key) for key in file.metadata} | extra
    write_gguf(made, meta, infos, (file.raw(info.name) for info in infos))


def test_gguf_metadata_of_every_type_survive(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "plain.gguf")
    with_metadata(tmp_path / "plain.gguf", tmp_path / "a.gguf", KEPT)
    qjax.save(qjax.load(tmp_path / "a.gguf"), tmp_path / "b.gguf")
    first, second = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    assert first.metadata == second.metadata and first.kinds == second.kinds
    assert first.metadata["a.u64"] == 1 << 63 and first.kinds["a.i8"] == np.int8  # the comparison is of what was meant
    assert second.kinds.keys() >= {key for key in KEPT if key.startswith("a.") and key != "a.words"}


def test_quantizing_a_file_keeps_them_too(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "plain.gguf")
    with_metadata(tmp_path / "plain.gguf", tmp_path / "a.gguf", KEPT)
    quantize_file(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")
    first, second = read_gguf(tmp_path / "a.gguf"), read_gguf(tmp_path / "b.gguf")
    ours = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in first.metadata.items() if k not in ours} == {
        k: v for k, v in second.metadata.items() if k not in ours
    }
    assert {k: v for k, v in first.kinds.items() if k not in ours} == {
        k: v for k, v in second.kinds.items() if k not in ours
    }


def test_a_file_of_another_name_keeps_the_models_and_a_given_name_wins(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "plain.gguf")
    assert read_gguf(tmp_path / "plain.gguf").metadata["general.name"] == "plain"
    model = qjax.load(tmp_path / "plain.gguf")
    qjax.save(model, tmp_path / "other.gguf")
    qjax.save(model, tmp_path / "named.gguf", name="mine")
    names = [read_gguf(tmp_path / f"{stem}.gguf").metadata["general.name"] for stem in ("other", "named")]
    assert names == ["plain", "mine"]


def test_split_numbers_are_of_one_file_only(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "plain.gguf")
    with_metadata(tmp_path / "plain.gguf", tmp_path / "a.gguf", {"split.no": np.uint16(0)})
    assert "split.no" not in qjax.load(tmp_path / "a.gguf").card.gguf


def test_the_end_of_a_turn_ends_a_text_in_either_container(llama_model, tmp_path):
    qjax.save(llama_model, tmp_path / "plain.gguf")
    assert qjax.load(tmp_path / "plain.gguf").stops == (1,)
    with_metadata(tmp_path / "plain.gguf", tmp_path / "a.gguf", KEPT)
    model = qjax.load(tmp_path / "a.gguf")
    assert model.stops == (1, 2)
    qjax.save(model, tmp_path / "folder")
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["eos_token_id"] == [1, 2]
    assert qjax.load(tmp_path / "folder").stops == (1, 2)


@pytest.fixture
def folder(llama_model, tmp_path):
    """A folder as others publish them: bfloat16, several EOS ids, sampling defaults."""
    path = tmp_path / "published"
    save_folder(llama_model, path, "bfloat16")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 2]}))
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 0, "eos_token_id": [1, 2, 7]}
    (path / "generation_config.json").write_text(json.dumps(said))
    return path


def test_a_folder_keeps_sampling_eos_ids_and_dtype(folder, tmp_path):
    qjax.save(qjax.load(folder), tmp_path / "again")
    said = json.loads((folder / "generation_config.json").read_text())
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == said
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["eos_token_id"] == [1, 2, 7] and config["torch_dtype"] == "bfloat16"
    first, second = open_folder(folder), open_folder(tmp_path / "again")
    assert {t.dtype for t in second.tensors.values()} == {"BF16"}
    for name in first.tensors:
        np.testing.assert_array_equal(first.array(name), second.array(name))


def test_weights_that_bfloat16_cannot_hold_are_saved_as_float32(folder, tmp_path):
    model = qjax.load(folder)
    trained = dataclasses.replace(model, params=jax.tree.map(lambda w: w * jnp.float32(1.001), model.params))
    qjax.save(trained, tmp_path / "trained")
    back = qjax.load(tmp_path / "trained")
    assert back.card.dtype == "float32"
    np.testing.assert_array_equal(back.params["embed"]["embedding"], trained.params["embed"]["embedding"])


def test_shards_are_what_the_single_file_is(llama_model, tmp_path):
    save_folder(llama_model, tmp_path / "one")
    save_folder(llama_model, tmp_path / "many", shard_bytes=100_000)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    n = len(names)
    assert n > 2 and names == [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = open_folder(tmp_path / "one"), open_folder(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.tensors.values())
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        np.testing.assert_array_equal(one.array(name), many.array(name))
    held = {}
    for t in many.tensors.values():
        held.setdefault(t.path, []).append(t.nbytes)
    assert all(sum(sizes) <= 100_000 or len(sizes) == 1 for sizes in held.values())
    assert not (tmp_path / "many" / "model.safetensors").exists()
    back = load_folder(tmp_path / "many")
    np.testing.assert_array_equal(back.params["head"]["kernel"], llama_model.params["head"]["kernel"])
