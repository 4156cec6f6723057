"""Every training experiment runs from its config, and what it reports is what it exports."""

import json
from pathlib import Path

import jax
import pytest
from test_cli_models import make_folder

import qjax
from qjax.cli import main

CONFIGS = Path(__file__).parents[2] / "configs" / "training"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    text.write_text("def main(argv):\n    return [x for x in argv if x]\n" * 200)
    return ["--model", str(make_folder(folder / "model")), "--text", str(text), "--heldout", str(text)]


def run(name, out, *options):
    assert main(["run", str(CONFIGS / f"{name}.toml"), "--smoke", "--out", str(out), *map(str, options)]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_qat(tiny, tmp_path, capsys):
    options = [*tiny, "--arm.format", "Q4_0", "--arm.init", "gptq", "--export", "gguf"]
    results = run("qat", tmp_path / "run", *options)
    assert set(results["losses"]) == {"float", "gptq", "trained"} and results["rows"][-1]["step"] == 2
    model = qjax.load(tmp_path / "run" / "model.gguf")
    leaves = jax.tree.leaves(model.params, is_leaf=qjax.is_qtensor)
    assert any(qjax.is_qtensor(leaf) and leaf.format.name == "Q4_0" for leaf in leaves)
    assert "bits per quantized weight" in capsys.readouterr().out
    assert run("qat", tmp_path / "run", *options)["losses"] == results["losses"]  # nothing was left to do


def test_formats_that_the_file_lacks_are_refused_before_any_work(tiny, tmp_path, capsys):
    options = [*tiny, "--arm.format", "int3_g32", "--export", "gguf", "--out", str(tmp_path)]
    assert main(["run", str(CONFIGS / "qat.toml"), "--smoke", *options]) == 2
    assert "GGUF has no type int3_g32" in capsys.readouterr().err
    assert not (tmp_path / "tokens.bin").exists()


@pytest.mark.slow
def test_distill(tiny, tmp_path):
    results = run("distill", tmp_path, "--teacher", *tiny[1:], "--arm.format", "int3_g32")
    assert results["rows"][-1]["fkl"] > 0 and (tmp_path / "teacher").is_dir()


@pytest.mark.slow
def test_qlora(tiny, tmp_path):
    results = run("qlora", tmp_path, *tiny)
    by = {r["method"]: r for r in results["runs"]}
    assert by["qlora"]["semantics"] == "requantized" and by["loraqat"]["semantics"] == "fake-quantized"
    assert by["loraqat"]["merged"] == pytest.approx(by["loraqat"]["adapted"], rel=1e-5)


@pytest.mark.slow
def test_arms(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, models = tmp_path / "out", tmp_path / "models"
    options = ["--models", models, *tiny[2:]]
    results = run("qat_vs_ptq", out, *options)
    assert "closed, %" in capsys.readouterr().out and (models / "seed1" / "model").is_dir()
    names = [row["name"] for row in results["rows"]]
    assert names[:2] == ["start", "continued"] and "2 bits, qat + kd" in names and "ptq 2 bits: gptq" in names
    row = results["rows"][names.index("2 bits, qat + kd")]
    assert row["quant_noise"] > 0.1 and row["closed_percent"] is not None and row["half_interval"] is None

    assert run("qat_vs_ptq", out, *options)["rows"] == results["rows"]  # nothing was left to do
    other = ["run", str(CONFIGS / "qat_vs_ptq.toml"), "--smoke", *map(str, options), "--base.layers", "3"]
    assert main(other) == 2
    assert "holds other float models" in capsys.readouterr().err
