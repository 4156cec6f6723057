"""The command line through its real entry: exit statuses, one line for a mistake, stable JSON."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qjax.cli import COMMANDS, main, output
from qjax.cli import run as run_command
from qjax.cli.process import streams as output_streams
from qjax.io.lock import locked


@pytest.fixture
def mistake(capsys):
    """Run a command line that must end with 2 and one line on standard error; returns the line."""

    def check(*argv: object) -> str:
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("qjax: ") and said.err.count("\n") == 1, said.err
        assert "Traceback" not in said.err
        return said.err

    return check


EXPERIMENT = '''
import dataclasses, json, os, signal
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
    seed: int = 0
    seeds: tuple[int, ...] = ()
    inner: Inner = Inner()

def run(config: Config, out: Path) -> dict:
    if config.fail == "start":
        raise UserError("no such model")
    (out / "work").write_text("done")
    if config.fail == "user":
        raise UserError("bad\\ninput")
    if config.fail == "bug":
        raise RuntimeError("broken")
    if config.fail in ("SIGTERM", "SIGHUP"):
        os.kill(os.getpid(), getattr(signal, config.fail))
        os.read(os.pipe()[0], 1)  # until the signal comes
    if config.fail == "pipe":
        raise BrokenPipeError
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


@pytest.mark.parametrize(
    "fail, status",
    [
        ("user", 2), ("disk", 2), ("bug", 1), ("stop", 130), ("SIGTERM", 143), ("SIGHUP", 129),
    ],
)  # fmt: skip
def test_exit_status_tells_whose_fault_it_was(toy, tmp_path, capsys, fail, status):
    if fail == "SIGHUP" and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        pytest.skip("under nohup, which is obeyed")
    out = tmp_path / "out"
    assert main(["run", str(toy), "--fail", fail, "--out", str(out)]) == status
    err = capsys.readouterr().err
    assert ("Traceback" in err) == (fail == "bug")
    assert json.loads((out / "manifest.json").read_text())["exit_status"] == status
    assert not (out / "results.json").exists()
    if fail == "user":
        assert err == "qjax: bad input\n"
    if status > 128:
        assert err == f"\nqjax: interrupted; {out} keeps what was done; the same command with --out {out} continues\n"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
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
    for key, seed in (("seed", 2**31), ("seed", -1), ("seeds", 2**63)):
        assert f"{key}" in (said := mistake("run", toy, f"--{key}", seed)) and "0 .. 2147483647" in said
    assert "is not UTF-8 text" in mistake("run", toy, "--fail", "\udcff")
    assert "no such config" in mistake("run", tmp_path / "\udcff.toml")
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


def test_kernels_says_what_runs_where_and_why(capsys):
    import qjax

    assert main(["kernels", "--json", "-"]) == 0
    rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["formats"]}
    assert set(rows) == set(qjax.format_names())
    assert [rows["Q4_0"][p]["kernel"] for p in ("cpu", "cuda", "tpu")] == ["lanes", "mosaic_gpu", "mosaic_tpu"]
    assert main(["kernels", "NF4", "--rows", "8"]) == 0
    assert "levels are a table" in " ".join(capsys.readouterr().out.split())
    for argv, message in (
        (["--rows", "0"], "--rows 0: expected at least 1"),
        (["Q4_K", "--shape", "64", "100"], "--shape 64 100"),
        (["Q4_Q"], "did you mean"),
    ):
        assert main(["kernels", *argv]) == 2
        assert message in capsys.readouterr().err


def test_python_dash_m_and_a_closed_pipe(tmp_path):
    done = subprocess.run([sys.executable, "-m", "qjax", "nonsense"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("qjax: unknown command 'nonsense'")
    help_ = subprocess.run([sys.executable, "-m", "qjax", "--help"], capture_output=True, text=True, timeout=120)
    assert help_.returncode == 0 and "qjax run configs/quickstart.toml" in help_.stdout


# --- a config is data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["help", "key", "extends", "link"])
def test_a_config_runs_only_scripts_of_the_experiments_folder(how, tmp_path, monkeypatch, mistake):
    allowed, other = tmp_path / "experiments", tmp_path / "other"
    allowed.mkdir()
    other.mkdir()
    (other / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n" + EXPERIMENT
    )
    (allowed / "link.py").symlink_to(other / "evil.py")
    monkeypatch.setattr(run_command, "EXPERIMENTS", allowed)
    config = other / "a.toml"
    config.write_text('script = "evil.py"\n')
    if how == "extends":
        (other / "b.toml").write_text('extends = "a.toml"\n')
        config = other / "b.toml"
    if how == "link":
        config.write_text('script = "../experiments/link.py"\n')
    said = mistake("run", config, *(["--help"] if how == "help" else ["--keyz", "3"] if how == "key" else []))
    assert "lies outside of" in said and "--scripts" in said
    assert not (other / "evil.ran").exists()
    assert "there is no folder" in mistake("run", config, "--scripts", tmp_path / "gone")
    if how != "link":
        assert main(["run", str(config), "--scripts", str(other), "--out", str(tmp_path / "out")]) == 0


# --- a run directory is one run's ------------------------------------------------------------------------------------


def test_a_directory_that_is_no_run_of_this_config_is_left_alone(toy, tmp_path, mistake):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("manifest.json", "notes.txt"):
        (foreign / name).write_text("mine")
        assert f"holds '{name}' and is no run of this config" in mistake("run", toy, "--out", foreign)
        assert [p.read_text() for p in foreign.iterdir()] == ["mine"]
        (foreign / name).unlink()
    (foreign / ".config.toml.12ab.tmp").write_text("")  # a kill before the first file
    assert main(["run", str(toy), "--out", str(foreign)]) == 0
    (foreign / "config.toml").write_bytes(b"\xff\x00")
    assert "config.toml is damaged; give another --out" in mistake("run", toy, "--out", foreign)


def test_two_processes_do_not_share_a_run_directory(toy, tmp_path, mistake):
    out = tmp_path / "out"
    assert main(["run", str(toy), "--out", str(out)]) == 0
    before = (out / "manifest.json").read_bytes()
    with locked(out / ".lock", "this"):
        assert f"the run directory {out} is in use by another process" in mistake("run", toy, "--out", out)
    assert (out / "manifest.json").read_bytes() == before
    assert main(["run", str(toy), "--out", str(out)]) == 0


def test_a_failed_start_leaves_no_run_directory(toy, tmp_path, mistake, monkeypatch):
    assert "no such model" in mistake("run", toy, "--fail", "start", "--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    mistake("run", toy, "--fail", "start")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "runs").iterdir())
    assert main(["run", str(toy), "--out", str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "toy.py").write_text(EXPERIMENT.replace("steps: int = 3", "steps: int = 3; other: int = 1"))
    mistake("run", toy, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_a_damaged_manifest_begins_the_history_anew(toy, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", str(toy), "--out", str(out)]) == 0
    for damage in (b"\xff", b"[1]", b'{"earlier": 3}'):
        (out / "manifest.json").write_bytes(damage)
        capsys.readouterr()
        assert main(["run", str(toy), "--out", str(out)]) == 0
        assert f"{out / 'manifest.json'} is damaged" in capsys.readouterr().err
        assert "damaged" in json.loads((out / "manifest.json").read_text())["earlier"][0]["error"]


# --- standard streams ------------------------------------------------------------------------------------------------


def test_a_closed_standard_output_is_said(monkeypatch, mistake):
    monkeypatch.setattr(sys, "stdout", None)
    assert "standard output is closed" in mistake("formats")


def test_a_reader_that_stops_reading_is_no_mistake_but_of_a_run(toy, tmp_path, monkeypatch, mistake):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["formats"]) == 0
    monkeypatch.undo()
    monkeypatch.setattr(run_command, "EXPERIMENTS", tmp_path)
    assert "closed before the run ended" in mistake("run", toy, "--fail", "pipe", "--out", tmp_path / "out")


def test_a_full_standard_output_is_a_users_mistake(monkeypatch, mistake):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert "No space left on device" in mistake("formats")


def test_a_terminal_that_lacks_a_letter_gets_an_escape(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with output_streams():
        output.pairs([("perplexity", "3 \xb1 1"), ("name", "\udcff")])
        output.write_json(Path("-"), {"a": "\xb1\udcff"})
        sys.stdout.flush()
    lines = raw.getvalue().decode("ascii").split("\n", 2)
    assert lines[0] == "perplexity  3 \\xb1 1" and lines[1].endswith("\\udcff")
    assert json.loads(lines[2]) == {"a": "\xb1\udcff"}


def test_control_characters_of_files_do_not_reach_the_terminal(capsys, mistake):
    assert "\x1b" not in mistake("inspect", "\x1b]0;title\x07.gguf")
    output.table(("key",), [("\x1b[31mred",), ("tab\tand\x9b",)])
    output.pairs([("\x1b[2J", "\u202eright to left")])
    said = capsys.readouterr().out
    assert "\\x1b[31mred" in said and not any(c in said for c in "\x1b\x9b\u202e")
