"""Streaming: the file of llama.cpp's own quantizer byte by byte where its types are exact, and no tensor done twice."""

import ctypes
import os
import signal
import subprocess
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest

import qjax.pipeline.stream as stream
from qjax.errors import UserError
from qjax.io.gguf_write import TensorInfo, write_gguf
from qjax.models.config import DecoderConfig
from qjax.models.families import config_to_gguf
from qjax.pipeline import quantize_file
from qjax.plan import Plan, Rule, decoder_weights

CONFIG = DecoderConfig(vocab=96, dim=256, hidden=512, layers=2, heads=4, kv_heads=2, head_dim=64)
PLAN = Plan((Rule("blk.0.ffn_up.weight", "keep"), Rule("blk.*", "Q8_0"), Rule("*", "Q4_0")))


def write_model(path, config=CONFIG, kind="BF16", edit=lambda tensors: None, seed=0):
    """A random model as a GGUF file with the least tokenizer."""
    rng = np.random.default_rng(seed)
    tensors = {
        w.gguf: (rng.standard_t(4, w.shape) * 0.05).astype(np.float32) if len(w.shape) > 1 else np.ones(w.shape, "<f4")
        for w in decoder_weights(config)
    }
    edit(tensors)
    dtype = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[kind]
    infos = [TensorInfo(n, w.shape, kind if w.ndim > 1 else "F32") for n, w in tensors.items()]
    metadata = config_to_gguf(config) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocab)],
        "tokenizer.ggml.scores": [0.0] * config.vocab,
        "tokenizer.ggml.token_type": [1] * config.vocab,
    }
    write_gguf(path, metadata, infos, (w.astype(dtype) if w.ndim > 1 else w for w in tensors.values()))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf")


def read(path):
    return {t.name: (t.tensor_type.name, bytes(t.data)) for t in gguf.GGUFReader(path).tensors}


def test_a_plan_becomes_a_file(model, tmp_path):
    calls = []
    report = quantize_file(model, tmp_path / "q.gguf", PLAN, progress=lambda *args: calls.append(args))
    source, got = read(model), read(tmp_path / "q.gguf")
    assert got["blk.0.ffn_up.weight"] == source["blk.0.ffn_up.weight"]
    for name, (_, raw) in got.items():
        w = np.frombuffer(source[name][1], ml_dtypes.bfloat16).astype(np.float32)
        if name.endswith("norm.weight"):
            assert (got[name]) == source[name]
        elif name != "blk.0.ffn_up.weight":
            kind = gguf.GGMLQuantizationType["Q8_0" if name.startswith("blk") else "Q4_0"]
            assert raw == gguf.quantize(w.reshape(-1, 32), kind).tobytes(), name
    lines = {t.name: t for t in report.tensors}
    assert list(lines) == list(got)
    w = np.frombuffer(source["output.weight"][1], ml_dtypes.bfloat16).astype(np.float32)
    back = gguf.dequantize(np.frombuffer(got["output.weight"][1], np.uint8), gguf.GGMLQuantizationType.Q4_0)
    expected = np.linalg.norm(back.ravel() - w) / np.linalg.norm(w)
    assert lines["output.weight"].error == pytest.approx(expected, rel=1e-4)
    assert lines["blk.0.ffn_up.weight"].kept == "kept by rule 'blk.0.ffn_up.weight'"
    assert sum(len(raw) for _, raw in got.values()) == report.nbytes
    assert [c[0] for c in calls] == list(got) and calls[-1][1] == calls[-1][2]
    assert sorted(os.listdir(tmp_path)) == ["q.gguf"]


def test_a_format_by_name_is_a_plan(model, tmp_path):
    """pure: the format itself in every matrix, where a mix has the same name."""
    report = quantize_file(model, tmp_path / "q.gguf", "pure:Q4_0")
    assert {t.format for t in report.tensors if not t.kept} == {"Q4_0"}
    assert {t.format for t in report.tensors if t.kept} == {"F32"}


def llama_quantize(model, out, file_type):
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    llama_cpp = pytest.importorskip("llama_cpp")
    p = llama_cpp.llama_model_quantize_default_params()
    p.ftype, p.nthread = file_type, 1
    assert llama_cpp.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(p)) == 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("source", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("file_type, number", [("Q8_0", 7), ("F16", 1), ("BF16", 32), ("F32", 0)])
def test_exact_types_give_llama_cpps_bytes(tmp_path, source, file_type, number):
    write_model(tmp_path / "m.gguf", kind=source)
    llama_quantize(tmp_path / "m.gguf", tmp_path / "theirs.gguf", number)
    quantize_file(tmp_path / "m.gguf", tmp_path / "ours.gguf", file_type)
    assert read(tmp_path / "ours.gguf") == read(tmp_path / "theirs.gguf")
    assert list(read(tmp_path / "ours.gguf")) == list(read(tmp_path / "theirs.gguf"))
    fields = gguf.GGUFReader(tmp_path / "ours.gguf").fields
    assert fields["general.file_type"].contents() == number


def test_pieces_do_not_show(model, tmp_path, monkeypatch):
    """The file does not depend on how tensors are cut."""
    import qjax.pipeline.encode as encode

    quantize_file(model, tmp_path / "a.gguf", PLAN)
    monkeypatch.setattr(encode, "CHUNK", 32 * 7)
    quantize_file(model, tmp_path / "b.gguf", PLAN)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# --- resuming -------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from qjax.pipeline import quantize_file
from qjax.plan import Plan
sys.path.insert(0, "tests")
count = 0
def progress(name, done, total):
    global count
    count += 1
    if count == 9:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_file(sys.argv[1], sys.argv[2], Plan.from_toml(sys.argv[3]), progress=progress)
"""


def encoded(monkeypatch):
    names = []
    real = stream.encode_tensor
    monkeypatch.setattr(stream, "encode_tensor", lambda pool, name, *a: names.append(name) or real(pool, name, *a))
    return names


def test_a_killed_run_is_continued(model, tmp_path, monkeypatch):
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.to_toml())
    out = tmp_path / "q.gguf"
    died = subprocess.run([sys.executable, "-c", KILLED, str(model), str(out), str(plan)], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not out.exists() and (tmp_path / "q.gguf.partial").exists()
    messages, names = [], encoded(monkeypatch)
    quantize_file(model, out, PLAN, notify=messages.append)
    assert len(messages) == 1 and "continuing" in messages[0]
    todo = [n for n in read(model) if not n.endswith("norm.weight") and n != "blk.0.ffn_up.weight"]
    assert 0 < len(names) < len(todo)
    report = quantize_file(model, tmp_path / "whole.gguf", PLAN)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert all(t.kept or t.error is not None for t in report.tensors)
    assert sorted(os.listdir(tmp_path)) == ["plan.toml", "q.gguf", "whole.gguf"]


class Stop(BaseException):
    pass


def interrupt(model, out, after=5, plan=PLAN):
    calls = []

    def progress(*args):
        calls.append(args)
        if len(calls) == after:
            raise Stop

    with pytest.raises(Stop):
        quantize_file(model, out, plan, progress=progress)


def test_a_damaged_part_is_done_again_and_torn_lines_are_ignored(model, tmp_path, monkeypatch):
    out, partial = tmp_path / "q.gguf", tmp_path / "q.gguf.partial"
    interrupt(model, out)
    whole = quantize_file(model, tmp_path / "whole.gguf", PLAN)
    offset = {t.name: t.data_offset for t in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}["output.weight"]
    with open(partial, "r+b") as f:
        f.seek(offset + 100)
        f.write(b"\x55\xaa\x55")
    with open(tmp_path / "q.gguf.partial.journal", "ab") as f:
        f.write(b'{"part": "blk.1.attn_q.we')
    names = encoded(monkeypatch)
    report = quantize_file(model, out, PLAN)
    assert "output.weight" in names and "token_embd.weight" not in names
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert report == whole


@pytest.mark.parametrize("change", ["plan", "model"])
def test_work_of_another_plan_or_model_is_dropped_with_a_message(model, tmp_path, monkeypatch, change):
    out = tmp_path / "q.gguf"
    interrupt(model, out)
    other = Plan((Rule("*", "Q8_0"),)) if change == "plan" else PLAN
    if change == "model":
        model = write_model(tmp_path / "m.gguf", seed=1)
    messages = []
    quantize_file(model, out, other, notify=messages.append)
    assert len(messages) == 1 and "starting over" in messages[0]
    quantize_file(model, tmp_path / "whole.gguf", other)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_two_writers_of_one_file_are_refused(model, tmp_path):
    def progress(*args):
        quantize_file(model, tmp_path / "q.gguf", PLAN)

    with pytest.raises(UserError, match="another process is writing"):
        quantize_file(model, tmp_path / "q.gguf", PLAN, progress=progress)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blk.1.attn_v.weight", "output_norm.weight", "blk.0.ffn_up.weight"])
def test_nan_names_the_tensor_and_leaves_nothing(tmp_path, name):
    def edit(tensors):
        tensors[name].reshape(-1)[17] = np.nan

    write_model(tmp_path / "m.gguf", edit=edit)
    with pytest.raises(UserError, match=f"{name}: 1 of its weights are NaN or infinite"):
        quantize_file(tmp_path / "m.gguf", tmp_path / "q.gguf", PLAN)
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_values_beyond_fp16_are_named(tmp_path):
    def edit(tensors):
        tensors["output.weight"][3, 3] = 1e6

    write_model(tmp_path / "m.gguf", edit=edit)
    with pytest.raises(UserError, match=r"output.weight: its values are too large for F16"):
        quantize_file(tmp_path / "m.gguf", tmp_path / "q.gguf", "F16")


def test_quantizing_twice_must_be_allowed(model, tmp_path):
    quantize_file(model, tmp_path / "q.gguf", "Q8_0")
    with pytest.raises(UserError, match=r"output.weight is Q8_0 already"):
        quantize_file(tmp_path / "q.gguf", tmp_path / "r.gguf", Plan((Rule("*", "Q4_0"),)))
    report = quantize_file(tmp_path / "q.gguf", tmp_path / "r.gguf", Plan((Rule("*", "Q4_0"),)), requantize=True)
    assert report.formats["Q4_0"] > 0
    w = np.frombuffer(read(tmp_path / "q.gguf")["output.weight"][1], np.uint8)
    w = gguf.dequantize(w, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quantize(w.reshape(-1, 32), gguf.GGMLQuantizationType.Q4_0).tobytes()
    assert read(tmp_path / "r.gguf")["output.weight"][1] == expected
    copy = quantize_file(tmp_path / "q.gguf", tmp_path / "s.gguf", "Q8_0")
    assert {t.kept for t in copy.tensors} == {"a vector", "is Q8_0 already"}


def test_a_full_disk_is_one_line_and_leaves_nothing(model, tmp_path):
    """The size limit of a process stands for the disk."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from qjax.pipeline import quantize_file\n"
        "from qjax.errors import UserError\n"
        "try: quantize_file(sys.argv[1], sys.argv[2], 'Q8_0')\n"
        "except UserError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", script, model, tmp_path / "q.gguf"], capture_output=True, text=True)
    assert "cannot write" in out.stdout and "the file grew past the allowed size" in out.stdout, out.stderr
    assert os.listdir(tmp_path) == []


def test_importance_is_checked_and_used(model, tmp_path):
    out = tmp_path / "q.gguf"
    for bad, message in [
        ({"blk.7.x": np.ones(4)}, "no tensor called 'blk.7.x'"),
        ({"output.weight": np.ones(4)}, "output.weight: importance of shape"),
        ({"output.weight": -np.ones(256)}, "output.weight: its importance has NaN"),
    ]:
        with pytest.raises(UserError, match=message):
            quantize_file(model, out, PLAN, importance=bad)
    weight = np.exp(np.random.default_rng(0).standard_normal(256) * 2).astype(np.float32)
    quantize_file(model, tmp_path / "plain.gguf", PLAN)
    quantize_file(model, out, PLAN, importance={"head/kernel": weight})
    w = np.frombuffer(read(model)["output.weight"][1], ml_dtypes.bfloat16).astype(np.float32).reshape(96, 256)

    def loss(path):
        raw = np.frombuffer(read(path)["output.weight"][1], np.uint8).reshape(96, -1)
        return (weight * (gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0) - w) ** 2).sum()

    assert loss(out) < 0.95 * loss(tmp_path / "plain.gguf")


def test_not_over_itself_and_not_from_nowhere(model, tmp_path):
    with pytest.raises(UserError, match="is the model itself"):
        quantize_file(model, model, "Q8_0")
    with pytest.raises(UserError, match="no such file or folder"):
        quantize_file(tmp_path / "nothing", tmp_path / "q.gguf", "Q8_0")


@pytest.mark.slow
def test_a_mix_has_llama_cpps_types_and_no_larger_errors(model, tmp_path):
    llama_quantize(model, tmp_path / "theirs.gguf", 15)
    report = quantize_file(model, tmp_path / "ours.gguf", "Q4_K_M")
    ours, theirs, source = read(tmp_path / "ours.gguf"), read(tmp_path / "theirs.gguf"), read(model)
    assert {n: t for n, (t, _) in ours.items()} == {n: t for n, (t, _) in theirs.items()}
    assert {"Q4_K", "Q6_K", "F32"} == set(report.formats)
    for name, (kind, raw) in ours.items():
        if kind != "F32":
            w = np.frombuffer(source[name][1], ml_dtypes.bfloat16).astype(np.float32)
            errors = [
                np.sum((gguf.dequantize(np.frombuffer(b, np.uint8), gguf.GGMLQuantizationType[kind]).ravel() - w) ** 2)
                for b in (raw, theirs[name][1])
            ]
            assert errors[0] <= errors[1], name
