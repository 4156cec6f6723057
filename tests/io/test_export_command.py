"""`qjax export`: from floats, from one container into the next, calibrated; what it refuses, in one line."""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import LLAMA, TEXT, random_params

import qjax
from qjax.cli import main
from qjax.errors import UserError
from qjax.io.exports import CONTAINERS
from qjax.io.gguf_read import read_gguf
from qjax.io.imatrix import Imatrix, write_imatrix
from qjax.io.shards import Shards
from qjax.io.text import texts_at
from qjax.models.model import Model
from qjax.pipeline import calibration_text, quantize_model
from qjax.pipeline.export import export_model
from qjax.plan import Plan, Rule
from qjax.tensor import is_qtensor

SMALL = dataclasses.replace(LLAMA, layers=1, hidden=64)
MIXTRAL = dataclasses.replace(LLAMA, layers=1, family="mixtral", experts=4, experts_used=2, expert_hidden=96)


@pytest.fixture(scope="module")
def floats(tmp_path_factory, bpe):
    path = tmp_path_factory.mktemp("export") / "floats"
    qjax.save(Model(SMALL, random_params(SMALL), bpe), path)
    return path


@pytest.fixture(scope="module")
def packed(floats):
    path = floats.parent / "packed"
    assert export(floats, path, "compressed-tensors", "--type", "int4_g32") == 0
    return path


def export(model, out, to, *options):
    return main(["export", str(model), "-o", str(out), "--to", to, *map(str, options)])


@pytest.fixture
def mistake(capsys, tmp_path):
    """Run an export that must end with 2, one line, and nothing left behind; returns the line."""

    def check(model, *options, out="out", to="compressed-tensors"):
        before = sorted(tmp_path.iterdir())
        capsys.readouterr()
        assert export(model, tmp_path / out, to, *options) == 2
        assert sorted(tmp_path.iterdir()) == before
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        return line

    return check


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, qjax.load(a).dense, qjax.load(b).dense)


def test_rounding_on_the_way_packs_what_quantize_makes(packed, floats):
    q = qjax.load(packed).params["layers_0"]["attn"]["q"]["kernel"]
    made = qjax.quantize(qjax.load(floats).params["layers_0"]["attn"]["q"]["kernel"], "int4_g32", axis=-2)
    jax.tree.map(np.testing.assert_array_equal, q.leaves, made.leaves)
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"] and (packed / "tokenizer.json").is_file()


def test_from_container_to_container_the_values_stay(packed, tmp_path):
    source = packed
    for to in ("gptq", "awq", "gptq_v2", "mlx", "compressed-tensors"):
        if to == "compressed-tensors":  # minima as floats, which only mlx has
            assert export(source, tmp_path / "no", to) == 2
            break
        assert export(source, tmp_path / to, to) == 0
        same(packed, tmp_path / to)
        source = tmp_path / to
    assert export(packed, tmp_path / "m.gguf", "gguf") == 0
    assert qjax.load(tmp_path / "m.gguf").params["layers_0"]["attn"]["q"]["kernel"].format.name == "Q4_0"
    same(packed, tmp_path / "m.gguf")
    assert export(tmp_path / "m.gguf", tmp_path / "back", "gptq") == 0
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "gptq", tmp_path / "back")]
    jax.tree.map(np.testing.assert_array_equal, *files)


def test_rounded_inputs_go_over_as_they_are(floats, mistake, tmp_path):
    w8a8 = "compressed-tensors_w8a8"
    assert export(floats, tmp_path / "a", w8a8, "--type", "int8_row") == 0
    q = qjax.load(tmp_path / "a").params["layers_0"]["attn"]["q"]["kernel"]
    assert q.rounds_inputs and q.format.name == "int8_row"
    assert export(tmp_path / "a", tmp_path / "b", w8a8) == 0
    files = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    jax.tree.map(np.testing.assert_array_equal, *files)
    assert f"q_proj.weight: its inputs are rounded too: --to {w8a8}" in mistake(tmp_path / "a")
    assert "lies behind RoundedInput" in mistake(tmp_path / "a", to="gptq")


def test_what_was_written_runs_and_tells_its_size(packed, tmp_path, capsys):
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = found["types"]["int4_g32"]
    assert found["kind"].endswith("compressed-tensors") and 4.5 < 8 * row["bytes"] / row["weights"] < 5
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    assert main(["eval", str(packed), "--text", str(text), "--ctx", "32", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_refusals_are_one_line_and_leave_nothing(floats, packed, mistake, tmp_path):
    assert "say what they become: --type" in mistake(floats)
    assert "'onnx2' is no container; these are written: gguf, compressed-tensors" in mistake(floats, to="onnx2")
    assert "name OUT .gguf" in mistake(packed, to="gguf")
    assert "gptq is a directory" in mistake(packed, to="gptq", out="m.gguf")
    assert "`qjax quantize -o OUT.gguf` rounds" in mistake(floats, "--type", "Q4_0", to="gguf", out="m.gguf")
    assert "its weights are floats" in mistake(floats, to="gguf", out="m.gguf")
    assert "mix of GGUF types" in mistake(floats, "--type", "Q4_K_M")
    assert "no place for NF4_b32;" in mistake(floats, "--type", "NF4_b32")
    assert "block of 128" in mistake(floats, "--type", "int4_g128")
    assert "is int4_g32 already" in mistake(packed, "--type", "int2_g32")
    assert "without --type or --plan nothing is rounded" in mistake(packed, "--recipe", "gptq")
    assert "no place for hadamard" in mistake(floats, "--type", "int4_g32", "--recipe", "quarot", "--calib", "self")
    plan = tmp_path / "plan.toml"
    plan.write_text('[rules]\n"*" = "int4_g32"\n')
    assert "embed/embedding: gptq packs linear layers" in mistake(floats, "--plan", plan, to="gptq")
    assert export(floats, tmp_path / "nf4", "bitsandbytes", "--type", "NF4_b32") == 0
    assert "no grid of integers" in mistake(tmp_path / "nf4", to="gguf", out="m.gguf")
    assert "--type Q4_K_M --requantize" in mistake(tmp_path / "nf4", to="gguf", out="m.gguf")


@pytest.mark.parametrize(
    ("error", "told"), [(OSError(errno.ENOSPC, "no space"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_export_that_ends_early_leaves_nothing(packed, tmp_path, monkeypatch, error, told):
    put, left = Shards.put, iter(range(5))

    def fails(self, name, array):
        if next(left, None) is None:
            raise error
        put(self, name, array)

    monkeypatch.setattr(Shards, "put", fails)
    with pytest.raises(told):
        export_model(packed, tmp_path / "out", "gptq")
    assert next(left, None) is None and not list(tmp_path.iterdir())


def test_what_a_killed_export_left_goes_with_the_next(packed, tmp_path):
    (dead := tmp_path / ".out.0123abcd.tmp").mkdir()
    (dead / "shard-1").write_bytes(b"half")
    assert export(packed, tmp_path / "out", "gptq") == 0
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_damaged_folder_ends_in_one_line(packed, mistake, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({k: v for k, v in tensors.items() if k != name}, folder / "model.safetensors")
    assert f"{name}' is missing" in mistake(folder, to="gptq")
    save_file(tensors | {name: np.full_like(tensors[name], np.inf)}, folder / "model.safetensors")
    assert "up_proj': its scales have NaN or infinite values" in mistake(folder, to="gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "vptq"
    (folder / "config.json").write_text(json.dumps(config))
    assert "weights quantized by 'vptq' are not read" in mistake(folder, to="gptq")


def test_experts_are_packed_one_by_one(tmp_path, bpe):
    params = random_params(MIXTRAL)
    qjax.save(Model(MIXTRAL, params, bpe), tmp_path / "floats")
    assert export(tmp_path / "floats", tmp_path / "a", "compressed-tensors", "--type", "uint4_g32") == 0
    assert export(tmp_path / "a", tmp_path / "b", "gptq") == 0
    assert any(name.endswith("experts.3.w3.qweight") for name in load_file(tmp_path / "b" / "model.safetensors"))
    stack = params["layers_0"]["mlp"]["experts"]["up"]["kernel"]
    made = qjax.dequantize(qjax.quantize(stack, "uint4_g32", axis=-2))
    for name in "ab":
        q = qjax.load(tmp_path / name).params["layers_0"]["mlp"]["experts"]["up"]["kernel"]
        np.testing.assert_array_equal(qjax.dequantize(q), made)
    assert export(tmp_path / "a", tmp_path / "m.gguf", "gguf") == 0
    q = qjax.load(tmp_path / "m.gguf").params["layers_0"]["mlp"]["experts"]["up"]["kernel"]
    assert q.format.name == "Q5_0"
    np.testing.assert_array_equal(qjax.dequantize(q), made)


@pytest.mark.slow
def test_a_calibrated_export_is_what_the_walk_makes(floats, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    options = ["--type", "uint4_g32", "--recipe", "gptq", "--calib", text, "--calib-ctx", 32, "--calib-windows", 8]
    assert export(floats, tmp_path / "out", "gptq", *options) == 0
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    model = qjax.load(floats)
    calibration = calibration_text(model, texts_at((str(text),)), context=32, limit=8)
    plan = Plan((Rule("embed/*", "keep"), Rule("head/*", "keep"), Rule("*", "uint4_g32")))
    expected = quantize_model(model, plan, "gptq", calibration)[0].params
    found = qjax.load(tmp_path / "out").params
    for a, b in zip(*(jax.tree.leaves(t, is_leaf=is_qtensor) for t in (found, expected)), strict=True):
        assert is_qtensor(a) == is_qtensor(b)
        np.testing.assert_array_equal(*(qjax.dequantize(x) if is_qtensor(x) else x for x in (a, b)))


def test_help_names_every_container(capsys):
    assert main(["export", "--help"]) == 0
    said = capsys.readouterr().out.split()
    assert {*CONTAINERS, "gguf"} <= {*said}


def test_a_file_says_which_importance_matrix_it_was_made_with(floats, tmp_path):
    names = [f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")]
    values = {name: np.ones(64, np.float32) for name in names}
    write_imatrix(tmp_path / "im.gguf", Imatrix(values, dict.fromkeys(names, 1024), ("book.txt",)))
    argv = ["quantize", str(floats), "-o", str(tmp_path / "m.gguf"), "--type", "Q4_0", "--imatrix"]
    assert main([*argv, str(tmp_path / "im.gguf")]) == 0
    said = read_gguf(tmp_path / "m.gguf").metadata
    found = {key.rpartition(".")[2]: value for key, value in said.items() if key.startswith("quantize.imatrix.")}
    assert found == {
        "file": str(tmp_path / "im.gguf"), "dataset": "book.txt", "entries_count": 5, "chunks_count": 2,
    }  # fmt: skip


def test_what_is_decoded_on_the_way_keeps_its_values(floats, tmp_path):
    half = tmp_path / "half"
    model = qjax.load(floats)
    qjax.save(dataclasses.replace(model, params=jax.tree.map(lambda x: x.astype("float16"), model.params)), half,
              dtype="float16")  # fmt: skip
    assert export(half, tmp_path / "mlx", "mlx", "--type", "int4_g32") == 0
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["torch_dtype"] == "float16"
    assert export(tmp_path / "mlx", tmp_path / "back", "mlx") == 0
    same(tmp_path / "mlx", tmp_path / "back")
    plan = tmp_path / "plan.toml"
    plan.write_text('[rules]\n"embed/*" = "uint4_g32"\n"head/*" = "keep"\n"*" = "int4_g64"\n')
    assert export(half, tmp_path / "mixed", "mlx", "--plan", plan) == 0
    params = qjax.load(tmp_path / "mixed").params
    assert params["embed"]["embedding"].format.name == "uint4_g32_m_f32"
    assert not is_qtensor(params["head"]["kernel"])
