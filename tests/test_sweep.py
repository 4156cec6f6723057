"""Sweeps: which runs a table means, every mistake named; finished runs stay, others are tried again; runs compared."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qjax import config, runs, sweep
from qjax.cli import main
from qjax.errors import UserError
from qjax.io.lock import locked

SCRIPT = """
import dataclasses, json, os, time
from pathlib import Path

@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: str = "a"

@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    seed: int = 0
    inner: Inner = Inner()
    wait: float = 0.0
    need: str = ""

def run(config, out):
    with (out / "began").open("a") as f:
        print("began", file=f)
    time.sleep(config.wait)
    if config.need and not Path(config.need).exists():
        raise RuntimeError("not there yet")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"losses": {"student": config.inner.rate * config.steps}, "gpu": len(gpu)}
"""


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: str = "a"


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 3
    seed: int = 0
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp.py").write_text(SCRIPT)
    return tmp_path


def read(folder, text, name="s.toml"):
    (folder / name).write_text('script = "exp.py"\n' + text)
    return config.read(folder / name)


TABLE = """
[sweep.grid]
inner.rate = [0.5, 1]
names = [["x"], []]
[sweep.zip]
seed = [1, 2]
"inner.kind" = ["p", "q"]
[[sweep.list]]
steps = 7
"""


def test_grid_zip_and_list_meet(folder):
    source = read(folder, TABLE)
    found = sweep.expand(source)
    assert len(found) == 8
    assert found[0] == {"inner.rate": 0.5, "names": ["x"], "seed": 1, "inner.kind": "p", "steps": 7}
    assert {(f["seed"], f["inner.kind"]) for f in found} == {(1, "p"), (2, "q")}
    made = sweep.planned(source, Config)
    assert made[-1].config == Config(7, 2, Inner(1.0, "q"), ())
    assert len({m.name for m in made}) == 8
    wider = read(folder, TABLE.replace("[0.5, 1]", "[0.5, 1, 2]"), "wider.toml")
    assert {m.name for m in made} < {m.name for m in sweep.planned(wider, Config)}  # what is done stays done


def test_runs_that_come_to_the_same_are_one_and_smoke_leaves_what_is_swept(folder):
    source = read(folder, "steps = 9\n[smoke]\nsteps = 1\ninner.rate = 0.1\n[sweep]\ngrid.inner.rate = [1, 1.0, 2]\n")
    assert [m.config.inner.rate for m in sweep.planned(source, Config)] == [1.0, 2.0]
    small = sweep.planned(source, Config, smoke=True)
    assert [(m.config.steps, m.config.inner.rate) for m in small] == [(1, 1.0), (1, 2.0)]


def test_a_base_has_no_sweep_and_a_run_says_where_to_go(folder, capsys):
    read(folder, "[sweep]\ngrid.seed = [1]\n", "base.toml")
    child = read(folder, 'extends = "base.toml"\n', "child.toml")
    with pytest.raises(UserError, match=r"child\.toml: has no \[sweep\] table"):
        sweep.expand(child)
    assert main(["run", "base.toml", "--scripts", "."]) == 2
    assert "say qjax sweep base.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("[sweep]\ngrit.seed = [1]", r"s\.toml:sweep\.grit: a sweep has grid, zip, list"),
        ("[sweep]\ngrid.seed = []", r"sweep\.grid\.seed: an empty list makes no run"),
        ("[sweep]\ngrid.seed = 1", r"sweep\.grid\.seed: must be a list of the values"),
        ("[sweep]\ngrid = {}", "has no values"),
        ("[sweep]\ngrid = 3", r"sweep\.grid: must be a table"),
        ("sweep = 3", r"sweep must be a table"),
        ("[sweep]\nlist = []", r"sweep\.list: must be tables of keys"),
        ("[sweep.zip]\nseed = [1, 2]\nsteps = [1]", "must be of one length, and these are not: seed 2, steps 1"),
        ("[sweep]\ngrid.seed = [1]\nzip.seed = [2]", "seed stands in two parts"),
        ("[sweep]\ngrid.sed = [1]", r"sweep over sed=1: .*s\.toml:sed: unknown key; did you mean seed\?"),
        ("[sweep]\ngrid.inner.rate = [1, 'fast']", r"sweep over inner\.rate=fast: .*inner\.rate: must be a number"),
    ],
)
def test_mistakes_are_named(folder, text, message):
    with pytest.raises(UserError, match=message):
        sweep.planned(read(folder, text), Config)


def go(*args):
    return main(["sweep", "s.toml", "--scripts", ".", "--out", "out", *args])


def test_dry_makes_nothing(folder, capsys):
    read(folder, "[sweep]\ngrid.seed = [1, 2]\n")
    assert go("--dry", "--json", "-") == 0
    said = json.loads(capsys.readouterr().out)
    assert [r["state"] for r in said["runs"]] == ["waiting"] * 2 and [r["values"]["seed"] for r in said["runs"]] == [
        1,
        2,
    ]
    assert not Path("out").exists()
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("")
    assert go() == 2 and "is no directory of a sweep" in capsys.readouterr().err
    assert go("--jobs", "0") == 2 and "--jobs: at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_failed_runs_are_tried_again_and_finished_ones_kept(folder, capsys):
    read(folder, "[sweep]\ngrid.inner.rate = [0.5, 2]\nzip.need = ['', 'wanted']\nzip.seed = [1, 2]\n")
    assert go("--devices", "3", "77") == 2
    said = capsys.readouterr().err
    assert "2 of 4 runs failed; see out/" in said and said.count(" done, ") == 2 and said.count(" failed, ") == 2
    log = next(p for p in Path("out").glob("*.log") if "not there yet" in p.read_text())
    assert "RuntimeError" in log.read_text()
    before = {p: p.stat().st_mtime_ns for p in Path("out").glob("*/results.json")}
    assert len(before) == 2
    assert {json.loads(p.read_text())["gpu"] for p in before} <= {1, 2}  # each saw one device
    Path("wanted").write_text("")
    assert go("--json", "sweep.json") == 0
    said = capsys.readouterr()
    assert "2 of 4 runs are finished already" in said.err and "out: 4 of 4 runs done" in said.out
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())
    rows = json.loads(Path("sweep.json").read_text())["runs"]
    assert [r["numbers"]["losses.student"] for r in rows] == [1.5, 1.5, 6.0, 6.0]
    assert go() == 0 and "4 of 4 runs are finished already" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_under_way(folder):
    read(folder, "wait = 60\n[sweep]\ngrid.seed = [1, 2, 3]\n")
    argv = [sys.executable, "-m", "qjax", "sweep", "s.toml", "--scripts", ".", "--out", "out", "--jobs", "2"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 180
    while len(list(Path("out").glob("*/began"))) < 2 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 130 and "the same command continues" in said
    found = list(runs.found([Path("out")]))
    assert [r.state for r in found] == ["interrupted"] * 2
    for run in found:
        with locked(run.path / ".lock", "the run"):  # nobody is left there
            pass


def sweeping(folder, *options):
    argv = [sys.executable, "-m", "qjax", "sweep", "s.toml", "--scripts", ".", "--out", "out", *options]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_commands_share_a_sweep_and_do_no_run_twice(folder):
    read(folder, "wait = 1.5\n[sweep]\ngrid.seed = [1, 2, 3, 4]\n")
    both = [sweeping(folder), sweeping(folder)]
    said = [p.communicate(timeout=300)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    own = [line for text in said for line in text.splitlines() if re.search(r"^\d/4 \w+ done, ", line)]
    assert len(own) == len({line.split()[1] for line in own}) == 4, said
    assert all(any(line in text for line in own) for text in said), "one did nothing"
    assert all(len(p.read_text().splitlines()) == 1 for p in Path("out").glob("*/began"))


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_when_it_is_run_again(folder):
    """Its run goes on without it; the next command waits for that one and does the others."""
    read(folder, "[sweep]\nzip.seed = [1, 2]\nzip.wait = [15.0, 0.0]\n")
    first = sweeping(folder)
    until = time.monotonic() + 180
    while not list(Path("out").glob("*/began")) and time.monotonic() < until and first.poll() is None:
        time.sleep(0.05)
    first.kill()
    first.communicate(timeout=60)
    again = sweeping(folder)
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    assert "done by another command" in said and len(list(Path("out").glob("*/results.json"))) == 2
    assert all(len(p.read_text().splitlines()) == 1 for p in Path("out").glob("*/began"))


@pytest.fixture
def two(folder):
    for name, rate, loss in (("a", 0.5, 3.25), ("b", 2.0, 3.0)):
        path = folder / "runs" / name
        path.mkdir(parents=True)
        manifest = {
            "start": "2026-01-01T00:00:00+00:00", "wall_seconds": 2.5, "exit_status": 0,
            "versions": {"jax": "0.10" if name == "a" else "0.11"},
            "git": {"commit": "0123456789ab", "changed": True},
        }  # fmt: skip
        (path / "manifest.json").write_text(json.dumps(manifest))
        (path / "config.toml").write_text(f"steps = 3\n[inner]\nrate = {rate}\n")
        (path / "results.json").write_text(json.dumps({"steps": 3, "losses": {"student": loss}, "rows": [{"kl": 0.1}]}))
    (folder / "runs" / "c").mkdir()
    (folder / "runs" / "c" / "manifest.json").write_text('{"exit_status": null}')
    (folder / "runs" / "d").mkdir()
    (folder / "runs" / "d" / "manifest.json").write_text("{")  # damaged: passed over
    return folder


def test_runs_are_listed(two, capsys):
    assert main(["runs", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(r["path"], r["state"]) for r in rows] == [("runs/a", "done"), ("runs/b", "done"), ("runs/c", "unfinished")]
    assert rows[0]["numbers"] == {"steps": 3.0, "losses.student": 3.25, "rows.0.kl": 0.1}
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "losses.student" in said and "3.25" in said and "0123456789+" in said
    assert main(["runs", "nowhere"]) == 2 and "nowhere: no such directory" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main(["runs", "empty"]) == 2 and "no run there yet" in capsys.readouterr().err


def test_two_runs_are_compared(two, capsys):
    assert main(["runs", "--diff", "runs/a", "runs/b", "--json", "-"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"] == [{"key": "inner.rate", "values": [0.5, 2.0]}]
    assert said["made by"] == [{"key": "jax", "values": ["0.10", "0.11"]}]
    assert said["numbers"] == [{"key": "losses.student", "values": [3.25, 3.0], "difference": -0.25}]
    assert main(["runs", "--diff", "runs/a", "runs/b"]) == 0
    assert "-0.25" in capsys.readouterr().out
    assert main(["runs", "--diff", "runs/a", "runs/a"]) == 0 and "no difference" in capsys.readouterr().out
    assert main(["runs", "--diff", "runs/a", "runs/d"]) == 2
    assert "runs/d: no run directory" in capsys.readouterr().err
