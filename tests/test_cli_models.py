"""Commands on model files: what they write and print, and what they refuse in one line without leaving a file."""

import errno
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import qjax
from qjax.cli import main
from qjax.cli.output import size
from qjax.evaluate.judge import windows_of
from qjax.io import tokenizer_cut
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.tokenizer import Tokenizer as Backend

CONFIG = DecoderConfig(vocab=384, dim=64, hidden=96, layers=2, heads=4, kv_heads=2, head_dim=16, context=64, tied=True)
TEXT = "def main(argv):\n    return [x for x in argv if x]\n" * 60


def make_folder(path):
    """A random model in Hugging Face's layout, with a tokenizer trained on TEXT."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", *(f"<unused{n}>" for n in range(CONFIG.vocab))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special[:2], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(special[2 : 2 + CONFIG.vocab - backend.get_vocab_size()])
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(s.ndim == 1, 0.1, s.shape), jnp.float32), shapes)
    qjax.save(Model(CONFIG, params, None), path)
    backend.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def gguf(folder):
    path = folder.parent / "tiny-q8.gguf"
    assert main(["quantize", str(folder), "-o", str(path), "--type", "Q8_0"]) == 0
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def mistake(capsys):
    """Run a command line that must end with 2 and one line on standard error; returns the line."""

    def check(*argv):
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("qjax: ") and said.count("\n") == 1, said
        return said

    return check


def copy_of(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# --- what they do ---------------------------------------------------------------------------------------------------


def test_quantize_writes_what_quantize_computes(folder, gguf):
    model, packed = qjax.load(folder), qjax.load(gguf)
    leaf = packed.params["layers_0"]["mlp"]["up"]["kernel"]
    assert qjax.is_qtensor(leaf) and leaf.format.name == "Q8_0"
    w = model.params["layers_0"]["mlp"]["up"]["kernel"]
    assert (np.asarray(qjax.dequantize(leaf)) == np.asarray(qjax.dequantize(qjax.quantize(w, "Q8_0", axis=0)))).all()


def test_quantize_by_plan_reports_every_tensor(folder, tmp_path, capsys):
    plan = tmp_path / "plan.toml"
    plan.write_text('[rules]\n"embed/embedding" = "keep"\n"*/mlp/*" = "Q4_0"\n"*" = "Q8_0"\n')
    out = tmp_path / "out.gguf"
    assert main(["quantize", str(folder), "-o", str(out), "--plan", str(plan), "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert set(made) == {
        "model", "out", "type", "recipe", "seconds", "written", "bits_per_weight", "nbytes", "formats", "notes",
        "tensors", "ledger",
    }  # fmt: skip
    assert made["written"] == out.stat().st_size
    tensors = {t["name"]: t for t in made["tensors"]}
    assert tensors["blk.1.ffn_up.weight"]["format"] == "Q4_0" and 0 < tensors["blk.1.ffn_up.weight"]["error"] < 0.2
    assert tensors["blk.1.attn_q.weight"]["format"] == "Q8_0"
    assert tensors["token_embd.weight"]["kept"] and tensors["token_embd.weight"]["error"] is None
    kept = [name for names in made["ledger"]["kept"].values() for name in names]
    assert sorted(kept) == sorted(name for name, t in tensors.items() if t["kept"])  # nothing is left out silently
    rest = [t for name, t in tensors.items() if name not in kept]
    bits = 8 * sum(t["nbytes"] for t in rest) / sum(math.prod(t["shape"]) for t in rest)
    assert made["ledger"]["quantized_bits"] == bits and made["ledger"]["whole_bits"] == made["bits_per_weight"]
    assert made["ledger"]["tokens"] is made["ledger"]["damping"] is None
    assert main(["inspect", str(out), "--json", "-"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert {t["name"]: t["type"] for t in seen["tensors"]}["blk.0.ffn_down.weight"] == "Q4_0"


def test_quantize_into_a_folder_stores_the_quantized_values(folder, tmp_path, capsys):
    out = tmp_path / "fake"
    assert main(["quantize", str(folder), "-o", str(out), "--type", "pure:Q4_0"]) == 0
    *_, stands_for, holds = capsys.readouterr().out.splitlines()
    disk = sum(f.stat().st_size for f in out.iterdir())
    assert "bits per weight" in stands_for and holds.endswith(f"as F32: {size(disk)} on disk")
    assert disk > 5 * qjax.load(folder).params["embed"]["embedding"].size
    w = qjax.load(folder).params["layers_1"]["attn"]["q"]["kernel"]
    expected = qjax.dequantize(qjax.quantize(w, "Q4_0", axis=0))
    assert (np.asarray(qjax.load(out).params["layers_1"]["attn"]["q"]["kernel"]) == np.asarray(expected)).all()


@pytest.mark.parametrize("name", ["E8P_2", "trellis2_L8_mul1"])
def test_vectors_go_into_a_folder_and_not_into_gguf(name, folder, tmp_path, capsys):
    out = tmp_path / "fake"
    assert main(["quantize", str(folder), "-o", str(out), "--type", name]) == 0
    w = qjax.load(folder).params["layers_1"]["attn"]["q"]["kernel"]
    expected = np.asarray(qjax.dequantize(qjax.quantize(w, name, axis=0)))
    assert (np.asarray(qjax.load(out).params["layers_1"]["attn"]["q"]["kernel"]) == expected).all()
    capsys.readouterr()
    assert main(["quantize", str(folder), "-o", str(tmp_path / "no.gguf"), "--type", name]) == 2
    assert f"{name} is not a GGUF type" in capsys.readouterr().err
    assert not (tmp_path / "no.gguf").exists()


@pytest.mark.parametrize("which", ["folder", "gguf"])
def test_inspect_counts_what_is_there(which, request, capsys):
    path = request.getfixturevalue(which)
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"file", "kind", "metadata", "tensors", "types", "weights", "bytes", "bits_per_weight"}
    assert found["weights"] == sum(x.size for x in jax.tree.leaves(qjax.load(path.parent / "tiny").params))
    assert found["bytes"] == sum(t["bytes"] for t in found["tensors"])
    assert math.isclose(found["bits_per_weight"], 8 * found["bytes"] / found["weights"])
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert all(t["name"] in shown for t in found["tensors"])
    assert main(["inspect", str(path), "--brief"]) == 0
    assert found["tensors"][-1]["name"] not in capsys.readouterr().out


def test_eval_has_stable_keys_and_agrees_with_judge(folder, gguf, text, capsys):
    from qjax.evaluate.judge import judge

    capsys.readouterr()
    assert main(["eval", str(gguf), "--text", str(text), "--baseline", str(folder), "--ctx", "32", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = judge(qjax.load(gguf), TEXT, baseline=qjax.load(folder), context=32, name=str(gguf)).to_json()
    assert set(found) == {"text", "baseline", *expected}
    assert found["perplexity"] == expected["perplexity"] and found["context"] == 32
    assert math.isclose(found["kl_mean"], expected["kl_mean"], rel_tol=1e-3) and 0 < found["kl_mean"] < 1e-2
    assert main(["eval", str(gguf), "--text", str(text)]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.slow
def test_generate_streams_and_seeds(gguf, capsys):
    def said(*options):
        capsys.readouterr()
        assert main(["generate", str(gguf), "--prompt", "def é", "--max-tokens", "12", *options]) == 0
        return capsys.readouterr().out

    assert said() == said() and said().startswith("def é")
    assert said("--temperature", "1", "--seed", "1") == said("--temperature", "1", "--seed", "1")
    assert said("--temperature", "1", "--seed", "1") != said("--temperature", "1", "--seed", "2")
    assert said("--packed") == said()


@pytest.mark.slow
def test_packed_weights_are_judged_as_decoded_ones_are(gguf, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    found = []
    for options in ([], ["--packed"]):
        assert (
            main(["eval", str(gguf), "--text", str(text), "--ctx", "32", "--limit", "2", "--json", "-", *options]) == 0
        )
        found.append(json.loads(capsys.readouterr().out))
    assert math.isclose(found[0]["perplexity"], found[1]["perplexity"], rel_tol=1e-5)
    assert found[0]["quantized_bytes"] == found[1]["quantized_bytes"]
    assert main(["generate", str(gguf), "--prompt", "def", "--max-tokens", "4", "--packed"]) == 0
    assert "packed weights: " in capsys.readouterr().err
    assert main(["generate", str(gguf), "--prompt", "def", "--max-tokens", "4"]) == 0
    assert "weights decoded to float32: " in capsys.readouterr().err
    assert main(["generate", str(gguf), "--prompt", "def", "--max-tokens", "4", "--cache", "Q9_0"]) == 2
    assert "unknown format 'Q9_0'" in capsys.readouterr().err


def test_eval_reads_no_more_of_a_text_than_it_judges(folder, monkeypatch):
    model, read, encode = qjax.load(folder), [], Backend.encode
    monkeypatch.setattr(tokenizer_cut, "PIECE", 100)
    monkeypatch.setattr(Backend, "encode", lambda self, piece, **how: read.append(piece) or encode(self, piece, **how))
    windows = windows_of(model, TEXT * 30, context=16, limit=2)
    assert 32 <= sum(map(len, read)) < 600
    whole = windows_of(model, TEXT * 30, context=16)
    assert len(windows) == 2 < len(whole) and (whole.tokens[:2] == windows.tokens).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["F32", "BF16"])
@pytest.mark.parametrize("suffix", [".gguf", ""])
def test_a_quantized_model_unpacks_into_floats(gguf, tmp_path, kind, suffix):
    """Which loses nothing, so it needs no --requantize."""
    out = tmp_path / f"floats{suffix}"
    assert main(["quantize", str(gguf), "-o", str(out), "--type", kind]) == 0
    made, packed = qjax.load(out).params, qjax.load(gguf).dense
    rounded = (lambda w: w) if kind == "F32" else (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32))
    for part in ("attn", "mlp"):
        for a, b in zip(*(jax.tree.leaves(p["layers_0"][part]) for p in (made, packed)), strict=True):
            np.testing.assert_array_equal(np.asarray(qjax.dequantize(a) if qjax.is_qtensor(a) else a), rounded(b))


# --- what they refuse -----------------------------------------------------------------------------------------------


def test_truncated_and_corrupt_gguf(gguf, text, tmp_path, mistake):
    raw = gguf.read_bytes()
    bad = tmp_path / "bad.gguf"
    out = tmp_path / "out.gguf"
    for content, word in [(raw[:-100], "truncated"), (b"GGML" + raw[4:], "not a GGUF file"), (raw[:5000], "")]:
        bad.write_bytes(content)
        for argv in (["inspect", bad], ["eval", bad, "--text", text], ["generate", bad, "--prompt", "x"],
                     ["quantize", bad, "-o", out, "--type", "Q4_0", "--requantize"]):  # fmt: skip
            said = mistake(*argv)
            assert str(bad) in said and word in said
    assert not out.exists()


def test_truncated_safetensors(folder, tmp_path, mistake):
    bad = copy_of(folder, tmp_path / "bad")
    file = bad / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    out = tmp_path / "out.gguf"
    for argv in (["inspect", bad], ["quantize", bad, "-o", out, "--type", "Q8_0"]):
        assert "model.safetensors" in mistake(*argv)
    assert not out.exists()


@pytest.mark.parametrize("path, name", [
    ("layers_1/mlp/down/kernel", "blk.1.ffn_down.weight"), ("layers_1/mlp_norm/scale", "blk.1.ffn_norm.weight")
])  # fmt: skip
def test_nan_names_the_tensor(folder, tmp_path, mistake, path, name):
    model = qjax.load(folder)
    *parts, last = path.split("/")
    at = model.params
    for key in parts:
        at = at[key]
    at[last] = at[last].at[(3,) * at[last].ndim].set(jnp.nan)
    bad = tmp_path / "bad"
    qjax.save(model, bad)
    for out in (tmp_path / "out.gguf", tmp_path / "out"):
        said = mistake("quantize", bad, "-o", out, "--type", "Q8_0")
        assert "NaN" in said and (name in said or path in said)
        assert not out.exists()


def test_missing_tokenizer(folder, text, tmp_path, mistake):
    bare = copy_of(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    out = tmp_path / "out.gguf"
    for argv in (["eval", bare, "--text", text], ["generate", bare, "--prompt", "x"],
                 ["quantize", bare, "-o", out, "--type", "Q8_0"]):  # fmt: skip
        assert "tokenizer" in mistake(*argv)
    assert not out.exists()


def test_an_empty_prompt_says_what_to_do(folder, tmp_path, mistake):
    bare = copy_of(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    assert "--prompt is empty, and this model has no BOS" in mistake("generate", bare, "--prompt", "")


def test_names_that_do_not_exist(folder, gguf, text, tmp_path, mistake):
    out = tmp_path / "out.gguf"
    quantize = ["quantize", folder, "-o", out]
    assert "Q4_0" in mistake(*quantize, "--type", "Q4_00")
    assert "keep" in mistake(*quantize, "--plan", plan(tmp_path, '"embed/*" = "Q8_0"'))
    assert "matches no weight" in mistake(*quantize, "--plan", plan(tmp_path, '"blk.9.*" = "Q8_0"\n"*" = "Q8_0"'))
    assert "Q8_1x" in mistake(*quantize, "--plan", plan(tmp_path, '"*" = "Q8_1x"'))
    assert "multiple of" in mistake(*quantize, "--plan", plan(tmp_path, '"*" = "TQ1_0"'))  # a row that no type fits
    assert "did you mean gptq" in mistake(*quantize, "--type", "Q8_0", "--recipe", "gpqt")
    assert "did you mean Q4_K_M" in mistake(*quantize, "--type", "Q4_KM")
    assert "Q8_K is a type of llama.cpp's that qjax does not have yet" in mistake(*quantize, "--type", "Q8_K")
    both = ["--type", "Q8_0", "--recipe", "gptq", "--calib", "self", "--calib", text]
    assert "the model's own text goes with no other" in mistake(*quantize, *both)
    (tmp_path / "no texts").mkdir()
    assert "holds no .txt" in mistake(*quantize, "--type", "Q8_0", "--recipe", "gptq", "--calib", tmp_path / "no texts")
    calibrated = [*quantize, "--type", "Q8_0", "--recipe", "gptq", "--calib", text]
    assert "--calib-windows 0: two are the least" in mistake(*calibrated, "--calib-windows", 0)
    assert "neither a stage nor a format; did you mean nearest" in mistake(*quantize, "--type", "Q8_0", "--recipe",
                                                                             "nearst >> ldlq")  # fmt: skip
    assert "writes no .bin file" in mistake("quantize", folder, "-o", tmp_path / "x.bin", "--type", "Q8_0")
    assert not (tmp_path / "x.bin").exists()
    assert "takes no calibration" in mistake(*quantize, "--type", "Q8_0", "--calib", text)
    assert "--type" in mistake(*quantize)
    assert "--type" in mistake(*quantize, "--type", "Q8_0", "--plan", "p.toml")
    for to in (out, tmp_path / "folder"):
        assert "already" in (said := mistake("quantize", gguf, "-o", to, "--type", "Q4_0")) and "--requantize" in said
    assert "no built-in model" in mistake("inspect", tmp_path / "nothing")
    assert "gone.txt" in mistake("eval", gguf, "--text", tmp_path / "gone.txt")
    (tmp_path / "bytes").write_bytes(b"abc \xff")
    (tmp_path / "empty").write_text("\n")
    assert "byte 4 is not UTF-8" in mistake("eval", gguf, "--text", tmp_path / "bytes")
    assert "there is no text in it" in mistake("eval", gguf, "--text", tmp_path / "empty")
    assert "more than the model's 64" in mistake("eval", gguf, "--text", text, "--ctx", 128)
    assert "--seed: a seed lies in 0 .. 2147483647" in mistake("generate", gguf, "--prompt", "x", "--seed", 2**31)
    assert "--rotate: a seed lies in" in mistake("fuse", folder, "-o", out, "--rotate", 2**63)
    assert "cannot read the text" in mistake("generate", gguf, "--prompt", "\udcff")
    assert "exceed the model's context" in mistake("generate", gguf, "--prompt", "x", "--max-tokens", 1000)
    assert not out.exists()


def plan(folder, rules):
    path = folder / "plan.toml"
    path.write_text(f"[rules]\n{rules}\n")
    return path


def test_a_full_disk_leaves_nothing_under_the_name(folder, tmp_path, mistake, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for out in (tmp_path / "out.gguf", tmp_path / "out"):
        assert "disk is full" in mistake("quantize", folder, "-o", out, "--type", "Q8_0")
        assert not out.exists()
    assert "disk is full" in mistake("inspect", folder, "--json", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from qjax.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_file_size_limit_through_the_real_program(folder, tmp_path):
    out = tmp_path / "out.gguf"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "quantize", str(folder), "-o", str(out), "--type", "Q8_0"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("qjax: cannot write ") and done.stderr.count("\n") == 1
    assert not out.exists()
