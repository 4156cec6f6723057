"""What is written never costs what was there: outputs that are inputs or exist, --json in the wrong place."""

import os

import pytest
from test_cli_models import TEXT, folder, gguf, mistake, text  # noqa: F401  (fixtures)

from qjax.cli import main
from qjax.errors import UserError
from qjax.io import atomic


@pytest.fixture
def models(folder, gguf, tmp_path):  # noqa: F811
    """A folder and a file of one's own, by names relative to where one is."""
    here = tmp_path / "here"
    (here / "dir").mkdir(parents=True)
    for file in folder.iterdir():
        (here / "dir" / file.name).write_bytes(file.read_bytes())
    (here / "m.gguf").write_bytes(gguf.read_bytes())
    (here / "link").symlink_to("dir")
    (here / "link.gguf").symlink_to("m.gguf")
    was = os.getcwd()
    os.chdir(here)
    yield here
    os.chdir(was)


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


QUANTIZE, FUSE = ("--type", "Q8_0", "--requantize"), ("--rotate", "1", "--untie")


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("command, options", [("quantize", QUANTIZE), ("fuse", FUSE)])
@pytest.mark.parametrize("model, out", [
    ("dir", "dir"), ("dir", "./dir/../dir/"), ("dir", "link"), ("link", "dir"), ("m.gguf", "m.gguf"),
    ("m.gguf", "../here/m.gguf"), ("link.gguf", "m.gguf"), ("m.gguf", "link.gguf"),
])  # fmt: skip
def test_a_model_is_never_its_own_output(models, mistake, command, options, model, out, force):  # noqa: F811
    before = contents(models)
    assert "is read; write to another name" in mistake(command, model, "-o", out, *options, *force)
    assert contents(models) == before


@pytest.mark.parametrize("command, options", [("quantize", QUANTIZE), ("fuse", FUSE)])
@pytest.mark.parametrize("out", ["other", "other.gguf"])
def test_another_model_is_replaced_only_with_force(models, mistake, command, options, out):  # noqa: F811
    made = models / out
    if out == "other":
        made.mkdir()
        for file in (models / "dir").iterdir():
            (made / file.name).write_bytes(b"another model")
        (made / "generation_config.json").touch()
    else:
        made.write_bytes(b"another model")
    before = contents(models)
    assert f"-o {out} exists; --force replaces it" in mistake(command, "dir", "-o", out, *options)
    assert contents(models) == before
    assert main([command, "dir", "-o", out, *options, "--force"]) == 0
    assert main(["inspect", out, "--json", "seen.json"]) == 0 and b"another model" not in contents(models).values()


def test_unfinished_work_is_no_output(models, mistake, monkeypatch):  # noqa: F811
    import qjax.pipeline.stream as stream

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(stream, "_run", stop)
        assert main(["quantize", "dir", "-o", "q.gguf", "--type", "Q8_0"]) == 130
    assert (models / "q.gguf.partial").exists()
    assert main(["quantize", "dir", "-o", "q.gguf", "--type", "Q8_0"]) == 0


def nothing(*args, **kwargs):
    raise AssertionError("work before the check")


@pytest.mark.parametrize("json, message", [
    ("q.gguf", "--json q.gguf is q.gguf itself"), ("dir", "is dir itself"), ("link", "is "),
    ("t.txt", "is t.txt itself"),
    ("dir/config.json", "is a file of "), ("gone/x.json", "cannot write "), ("/dev/null", "is no file"),
])  # fmt: skip
def test_json_is_looked_at_before_the_work(models, mistake, monkeypatch, json, message):  # noqa: F811
    import qjax.pipeline

    (models / "t.txt").write_text(TEXT)
    before = contents(models)
    with monkeypatch.context() as m:
        m.setattr(qjax.pipeline, "quantize_file", nothing)
        m.setattr("qjax.cli.evaluate.open_with_tokenizer", nothing)
        quantize = ("quantize", "dir", "-o", "q.gguf", "--type", "Q4_0", "--recipe", "gptq", "--calib", "t.txt")
        assert message in mistake(*quantize, "--json", json)
        if json != "q.gguf":
            assert message in mistake("eval", "dir", "--text", "t.txt", "--json", json)
            if json != "t.txt":
                assert message in mistake("inspect", "dir", "--json", json)
    if json.startswith(("gone", "/dev")):
        for command in ("formats", "recipes"):
            assert message in mistake(command, "--json", json)
    assert contents(models) == before


@pytest.mark.parametrize("out", ["gone/q.gguf", "gone/dir", "q.bin", "q.safetensors"])
@pytest.mark.parametrize("command, options", [("quantize", QUANTIZE), ("fuse", FUSE)])
def test_an_output_that_cannot_be_is_said_before_the_work(models, mistake, monkeypatch, command, options, out):  # noqa: F811
    monkeypatch.setattr("qjax.io.checkpoint.load", nothing)
    monkeypatch.setattr("qjax.pipeline.quantize_file", nothing)
    before = sorted(os.listdir(models))
    said = mistake(command, "dir", "-o", out, *options)
    assert ("no such folder" if out.startswith("gone") else "qjax writes no .") in said
    assert sorted(os.listdir(models)) == before


def test_a_disk_that_takes_no_file_is_said_before_the_work(tmp_path, monkeypatch):
    def read_only(*args):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(atomic.os, "open", read_only)
    with pytest.raises(UserError, match=r"cannot write .*/x\.json: the file system is read-only"):
        atomic.check_folder(tmp_path / "x.json")
