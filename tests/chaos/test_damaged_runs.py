"""A training run's files with damaged bytes: it goes on, or one line says which file."""

import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mutations import campaign

from qjax import rundir
from qjax.training.run.data import open_tokens, verify, write_tokens
from qjax.training.run.loop import Run, train
from qjax.training.run.state import init_state, make_step

OPTIMIZER = optax.sgd(0.1)
STEP = make_step(lambda params, kept, batch, key: (jnp.mean((params["w"] * batch) ** 2), {}), OPTIMIZER, donate=False)


def go(out, steps):
    state = init_state({"w": jnp.ones(4)}, OPTIMIZER)
    return train(state, STEP, lambda s: jnp.full((4,), s + 1.0, jnp.float32), Run(out, steps, 1, 1, 1, name="tiny"))


@pytest.mark.cases(8)
def test_training(tmp_path, cases):
    kept, out = tmp_path / "kept", tmp_path / "run"
    go(kept, 2)
    shutil.copytree(kept, out)
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".training.lock")

    def again():
        try:
            _, rows = go(out, 3)
            assert rows[-1]["step"] == 3
        finally:
            shutil.rmtree(out)
            shutil.copytree(kept, out)

    campaign("training", cases, files, again, read_only=False)


@pytest.mark.cases(80)
def test_tokens(tmp_path, cases):
    path = tmp_path / "tokens.bin"
    write_tokens(path, [np.arange(500) % 64], 64)
    outcomes = campaign("tokens", cases, [path, tmp_path / "tokens.bin.json"], lambda: verify(open_tokens(path)))
    assert outcomes["refused"]


@pytest.mark.cases(40)
def test_metrics(tmp_path, cases):
    for step in range(20):
        rundir.log(tmp_path, {"step": step, "loss": 1.5})
    path = tmp_path / "metrics.jsonl"
    assert campaign("metrics", cases, [path], lambda: rundir.logged(path))["refused"]


@pytest.mark.cases(8)
def test_manifest(tmp_path, cases, monkeypatch):
    """A damaged history begins anew, and the run goes on."""
    monkeypatch.setattr(rundir, "describe", lambda *a, **k: {"start": "now"})
    for _ in range(2):
        with rundir.record(tmp_path, "a = 1\n"):
            pass
    files = [tmp_path / "manifest.json", tmp_path / "config.toml"]
    good = files[1].read_bytes()

    def again():
        try:
            with rundir.record(rundir.create("tiny", tmp_path, "a = 1\n"), "a = 1\n"):
                pass
        finally:
            files[1].write_bytes(good)

    campaign("manifest", cases, files, again, read_only=False)
