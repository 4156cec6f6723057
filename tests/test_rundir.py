"""Run directories: the manifest tells what ran and how it ended, and the resolved config repeats it."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qjax import rundir
from qjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    data_seed: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
    text: Path
    seed: int = 7
    inner: Inner = Inner()


def test_manifest_of_a_good_run(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello")
    out = rundir.create("x", tmp_path / "run")
    with rundir.record(out, "seed = 7\n", config=Config(text), command=["qjax", "run", "x.toml"]):
        during = json.loads((out / "manifest.json").read_text())
        assert during["exit_status"] is None  # a killed run is told from a finished one
        rundir.log(out, {"step": 1, "loss": np.float32(0.5), "kl": float("nan")})
    made = json.loads((out / "manifest.json").read_text())
    assert made["exit_status"] == 0 and made["error"] is None and made["wall_seconds"] >= 0
    assert made["versions"]["jax"] == jax.__version__ and "python" in made["versions"]
    assert made["seeds"] == {"seed": 7, "inner.data_seed": 3}
    assert made["inputs_sha256"] == {str(text): hashlib.sha256(b"hello").hexdigest()}
    assert made["config_sha256"] == hashlib.sha256(b"seed = 7\n").hexdigest()
    assert made["device"]["count"] == jax.device_count() and made["cpu_count"] >= 1
    assert made["command"] == ["qjax", "run", "x.toml"]
    assert json.loads((out / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5, "kl": None}
    assert (out / "config.toml").read_text() == "seed = 7\n"


@pytest.mark.parametrize("error, status", [(UserError("no"), 2), (KeyboardInterrupt(), 130), (RuntimeError("bug"), 1)])
def test_manifest_of_a_failed_run(tmp_path, error, status):
    out = rundir.create("x", tmp_path / "run")
    with pytest.raises(type(error)), rundir.record(out, ""):
        (out / "work").write_text("done")
        raise error
    made = json.loads((out / "manifest.json").read_text())
    assert made["exit_status"] == status and type(error).__name__ in made["error"]


def test_continuing_a_run_keeps_its_history(tmp_path):
    for n in range(3):
        out = rundir.create("x", tmp_path / "run", "seed = 1\n")
        with rundir.record(out, "seed = 1\n", command=[str(n)]):
            pass
    made = json.loads((out / "manifest.json").read_text())
    assert [m["command"] for m in [*made["earlier"], made]] == [["0"], ["1"], ["2"]]
    with pytest.raises(UserError, match="another config"):
        rundir.create("x", tmp_path / "run", "seed = 2\n")


def test_names_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {rundir.create("grid") for _ in range(3)}
    assert len(made) == 3 and all(p.is_dir() and p.parent == Path("runs") for p in made)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        rundir.create("x", tmp_path / "file")


def test_a_line_that_a_kill_cut_off_is_no_row(tmp_path):
    rundir.log(tmp_path, {"step": 1})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    assert rundir.logged(path) == [{"step": 1}]
    rundir.log(tmp_path, {"step": 2, "name": "\udcff"})
    assert rundir.logged(path) == [{"step": 1}, {"step": 2, "name": "\udcff"}]
    path.write_bytes(b'{"step": 1}\n[3]\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: damaged"):
        rundir.logged(path)
    assert rundir.logged(tmp_path / "none") == []


def test_seeds_of_lists_are_told(tmp_path):
    assert rundir.seeds({"seeds": (3, 4), "a": {"seed": 5}, "seed_text": "x"}) == {
        "seeds.0": 3,
        "seeds.1": 4,
        "a.seed": 5,
    }


def test_plain_makes_anything_json():
    value = {"a": (np.float32(1), np.arange(2), float("inf")), 1: Path("x"), "c": Inner()}
    assert json.loads(json.dumps(rundir.plain(value))) == {"a": [1.0, [0, 1], None], "1": "x", "c": {"data_seed": 3}}


def test_commit_is_of_this_source_tree():
    found = rundir.git_commit()
    if not (Path(__file__).parents[1] / ".git").exists():
        pytest.skip("not a git work tree")
    assert found is not None and len(found["commit"]) == 40
