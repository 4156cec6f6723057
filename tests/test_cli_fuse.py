"""`qjax fuse`: what it writes is the same model; what it refuses it says in one line."""

import numpy as np
import pytest
from test_cli_models import make_folder

import qjax
from qjax.cli import main


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "tiny")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options",
    [
        ["--rotate", "3"],
        ["--scale", "smooth(0.5)"],
        ["--scale", "awq_scale(4)", "--format", "Q4_0"],
        ["--rotate", "3", "--learn", "Q4_0", "--learn-steps", "2"],
    ],
)
@pytest.mark.parametrize("out", ["fused.gguf", "fused"])
def test_the_same_model(options, out, folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a text to look at activations with. " * 60)
    calib = ["--calib", str(text), "--calib-ctx", "16"] if {"--scale", "--learn"} & {*options} else []
    status = main(["fuse", str(folder), "-o", str(tmp_path / out), "--untie", *options, *calib])
    assert status == 0, capsys.readouterr().err
    tokens = np.arange(12, dtype=np.int32)[None] % 7
    a, b = qjax.load(folder).logits(tokens), qjax.load(tmp_path / out).logits(tokens)
    assert float(abs(a - b).max() / abs(a).max()) < 1e-4
    assert "the same model" in capsys.readouterr().out


WRONG = [
    ([], "needs --rotate SEED, --scale SEARCH"),
    (["--scale", "smooth()"], "go with --calib"),
    (["--learn", "Q4_0", "--rotate", "1", "--untie"], "go with --calib"),
    (["--rotate", "1", "--learn-steps", "5"], "beside --learn FORMAT"),
    (["--learn", "Q4_0", "--learn-steps", "0", "--rotate", "1", "--calib", "TEXT"], "at least 1"),
    (["--learn", "Q4_0", "--scale", "smooth()", "--calib", "TEXT"], "--rotate SEED begins with"),
    (["--scale", "nearest()", "--calib", "TEXT"], "not one reparametrization"),
    (["--scale", "hadamard()", "--calib", "TEXT"], "no channel scaling"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[m for _, m in WRONG])
def test_mistakes_are_one_line(options, message, folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a text to look at activations with. " * 60)
    options = [str(text) if o == "TEXT" else o for o in options]
    assert main(["fuse", str(folder), "-o", str(tmp_path / "x.gguf"), "--calib-ctx", "16", *options]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "x.gguf").exists()
