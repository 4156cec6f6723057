"""`qjax quantize --tune --tune-blocks`: an ordinary file of the same types and sizes, and what its ledger says."""

import json
import re

import numpy as np
import pytest
from test_cli_models import make_folder

import qjax
from qjax.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("a text to look at activations with. " * 60)
    return path


def quantized(folder, out, text, *options):
    """What the report says."""
    argv = ["quantize", folder, "-o", out, "--calib", text, "--calib-ctx", 16, "--json", f"{out}.json", *options]
    assert main([str(a) for a in argv]) == 0
    return json.loads(out.with_name(f"{out.name}.json").read_text())


@pytest.mark.slow
def test_a_tuned_file_is_an_ordinary_one(folder, text, tmp_path):
    how = "--type", "Q4_0", "--recipe", "gptq"
    plain = quantized(folder, tmp_path / "plain.gguf", text, *how)
    said = quantized(folder, tmp_path / "tuned.gguf", text, *how, "--tune", 4, "--tune-blocks", 4)
    tuned = said["ledger"]["tuned"]
    assert tuned["steps"] == 4 and tuned["loss"] <= tuned["first_loss"] and "kept" in tuned
    assert plain["ledger"]["tuned"] is None
    blocks = {
        name for note in said["ledger"]["notes"] for name in re.findall(r"(layers_\d+) tuned on its output", note)
    }
    assert blocks == {"layers_0", "layers_1"}
    assert said["nbytes"] == plain["nbytes"] and said["formats"]["Q4_0"] == plain["formats"]["Q4_0"]
    a, b = (qjax.load(tmp_path / f"{name}.gguf") for name in ("plain", "tuned"))
    tokens = np.arange(12, dtype=np.int32)[None] % 7
    assert float(abs(a.logits(tokens) - b.logits(tokens)).max()) > 0
    assert sum(t["error"] is not None for t in said["tensors"]) == sum(t["error"] is not None for t in plain["tensors"])


@pytest.mark.slow
def test_without_a_recipe_that_looks_the_text_is_for_tuning_alone(folder, text, tmp_path):
    said = quantized(folder, tmp_path / "tuned", text, "--type", "int4_g32", "--tune", 2)
    assert said["ledger"]["tuned"]["steps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--type", "Q4_0", "--recipe", "gptq", "--tune-within"), "say for how long, as in --tune-blocks 50"),
        (["--tune", "-1"], "--tune -1: a number of steps"),
        (["--tune-blocks", "3"], "rounds no block behind its input"),
        (["--tune", "3", "--join", "localhost:1/2/0"], "leave --join out"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, options, message):
    assert main(["quantize", str(folder), "-o", str(tmp_path / "x.gguf"), "--type", "Q4_0", *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.gguf").exists()
