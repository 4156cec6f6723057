"""The command line through its real entry: exit statuses, one line for a mistake, stable JSON."""

import json
import subprocess
import sys

import pytest

from qjax.cli import COMMANDS, main


@pytest.fixture
def mistake(capsys):
    """Run a command line that must end with 2 and one line on standard error; returns the line."""

    def check(*argv: object) -> str:
        assert main([str(a) for a in argv]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("qjax: ") and said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.err
        return said.err

    return check


EXPERIMENT = '''
import dataclasses, json
from pathlib import Path
from qjax.errors import UserError

@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5

@dataclasses.dataclass(frozen=True)
class Config:
    """A toy."""
    steps: int = 3  # how long
    fail: str = ""
    inner: Inner = Inner()

def run(config: Config, out: Path) -> dict:
    if config.fail == "start":
        raise UserError("no such model")
    (out / "work").write_text("done")
    if config.fail == "user":
        raise UserError("bad\\ninput")
    if config.fail == "bug":
        raise RuntimeError("broken")
    if config.fail == "stop":
        raise KeyboardInterrupt
    if config.fail == "disk":
        raise OSError(28, "No space left on device", str(out / "x"))
    return {"steps": config.steps, "rate": config.inner.rate}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(EXPERIMENT)
    path = tmp_path / "toy.toml"
    path.write_text('script = "toy.py"\nsteps = 5\n[smoke]\nsteps = 1\n')
    monkeypatch.setattr("qjax.cli.run.EXPERIMENTS", tmp_path)
    return path


def results(out):
    return json.loads((out / "results.json").read_text())


def test_run_writes_the_run_directory_and_can_be_repeated(toy, tmp_path):
    out = tmp_path / "out"
    assert main(["run", str(toy), "--inner.rate", "0.25", "--out", str(out)]) == 0
    assert results(out) == {"steps": 5, "rate": 0.25}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["exit_status"] == 0
    assert {toy.name, "toy.py"} <= {name.rsplit("/", 1)[-1] for name in manifest["inputs_sha256"]}
    again = tmp_path / "again"
    assert main(["run", str(out / "config.toml"), "--out", str(again)]) == 0
    assert results(again) == results(out)


def test_smoke_and_overrides(toy, tmp_path):
    assert main(["run", str(toy), "--smoke", "--out", str(tmp_path / "a")]) == 0
    assert results(tmp_path / "a")["steps"] == 1
    assert main(["run", "--out", str(tmp_path / "b"), str(toy), "--smoke", "--steps", "9"]) == 0
    assert results(tmp_path / "b")["steps"] == 9


def test_default_run_directory_is_named_after_the_config(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(toy)]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("toy-") and results(made)["steps"] == 5


@pytest.mark.parametrize("fail, status", [("user", 2), ("disk", 2), ("bug", 1), ("stop", 130)])
def test_exit_status_tells_whose_fault_it_was(toy, tmp_path, capsys, fail, status):
    out = tmp_path / "out"
    assert main(["run", str(toy), "--fail", fail, "--out", str(out)]) == status
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (fail == "bug")
    assert json.loads((out / "manifest.json").read_text())["exit_status"] == status
    assert not (out / "results.json").exists()
    if fail == "user":
        assert err == "qjax: bad input\n"
    if fail == "disk":
        assert err == f"qjax: {out / 'x'}: No space left on device\n"


def test_help_of_a_config_lists_its_keys(toy, capsys):
    assert main(["run", str(toy), "--help"]) == 0
    said = capsys.readouterr().out
    assert "--steps" in said and "--inner.rate" in said and "how long" in said and "default: 5" in said


def test_wrong_configs(toy, tmp_path, mistake):
    toy.write_text('script = "toy.py"\nstpes = 3\n')
    assert mistake("run", toy) == f"qjax: {toy}:stpes: unknown key; did you mean steps?\n"
    toy.write_text('script = "gone.py"\n')
    assert f"{toy}:script: " in mistake("run", toy)
    toy.write_text("steps = 3\n")
    assert "no key `script`" in mistake("run", toy)
    toy.write_text('script = "toy.py"\n')
    assert "no [smoke] table" in mistake("run", toy, "--smoke")
    assert "no such config" in mistake("run", tmp_path / "gone.toml")
    (tmp_path / "toy.py").write_text("x = 1\n")
    assert "must define a dataclass `Config`" in mistake("run", toy)


@pytest.mark.parametrize("argv", [["run", "x.toml", "--setps", "3"], ["formats", "--jsn"], ["eval"], ["quantize", "x"]])
def test_a_command_line_that_does_not_parse_is_a_users_mistake(toy, monkeypatch, capsys, argv):
    monkeypatch.chdir(toy.parent)
    toy.rename("x.toml")
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_commands(capsys, mistake):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    assert mistake("quantise") == "qjax: unknown command 'quantise'; did you mean quantize?\n"
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"qjax {name}" in capsys.readouterr().out.split("usage:", 1)[1]


def test_formats_lists_every_format(capsys, tmp_path):
    import qjax

    assert main(["formats"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in qjax.format_names())
    assert main(["formats", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["formats"]
    assert {r["name"] for r in rows} == set(qjax.format_names())
    assert all(set(r) == {"name", "bits_per_weight", "block", "family", "about"} for r in rows)
    assert {r["name"]: r["bits_per_weight"] for r in rows}["Q8_0"] == 8.5
    assert main(["formats", "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["formats"] == rows


def test_python_dash_m_and_a_closed_pipe(tmp_path):
    done = subprocess.run([sys.executable, "-m", "qjax", "nonsense"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("qjax: unknown command 'nonsense'")
    help_ = subprocess.run([sys.executable, "-m", "qjax", "--help"], capture_output=True, text=True, timeout=120)
    assert help_.returncode == 0 and "qjax run configs/quickstart.toml" in help_.stdout
