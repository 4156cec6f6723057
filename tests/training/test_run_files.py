"""A training run's files, damaged or in use: one line that names the file; and what a run says as it goes."""

import shutil

import jax.numpy as jnp
import optax
import pytest

from qjax import terminal
from qjax.errors import UserError
from qjax.io.lock import locked
from qjax.training.run.loop import Run, train
from qjax.training.run.state import init_state, make_step

OPTIMIZER = optax.sgd(0.1)
STEP = make_step(lambda params, kept, batch, key: (jnp.mean((params["w"] * batch) ** 2), {}), OPTIMIZER, donate=False)


def go(out, steps):
    state = init_state({"w": jnp.ones(4)}, OPTIMIZER)
    return train(state, STEP, lambda s: jnp.full((4,), s + 1.0, jnp.float32), Run(out, steps, 1, 1, 1, name="tiny"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    go(out, 2)
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[1]", b"{" * 3000])
@pytest.mark.parametrize(
    "name", ["identity.json", "checkpoints/2/default/_METADATA", "checkpoints/2/default/manifest.ocdbt"]
)
def test_a_damaged_file_is_named_in_one_line(run, name, damage):
    (run / name).write_bytes(damage)
    where = run / "identity.json" if name == "identity.json" else run / "checkpoints" / "2"
    with pytest.raises(UserError) as caught:
        go(run, 3)
    assert str(where) in str(caught.value) and "damaged" in str(caught.value) and "\n" not in str(caught.value)
    if name != "identity.json":  # as the message says
        shutil.rmtree(where)
        _, rows = go(run, 3)
        assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_folder_of_checkpoints_that_orbax_cannot_read(run):
    (run / "checkpoints" / "2" / "_CHECKPOINT_METADATA").write_bytes(b"[1]")
    with pytest.raises(UserError, match="checkpoints is damaged or cannot be used"):
        go(run, 3)


@pytest.mark.parametrize("line", [b"[3]\n", b'{"loss": 1}\n', b"\xff\n", b'{"step": 1, "lo\n'])
def test_a_damaged_row_of_the_log_is_named(run, line):
    log = run / "metrics.jsonl"
    log.write_bytes(line + log.read_bytes())
    with pytest.raises(UserError, match=r"metrics\.jsonl:1 is no row of a log"):
        go(run, 3)


def test_a_log_that_lost_its_rows_is_said(run, capsys):
    (run / "metrics.jsonl").write_bytes(b"")
    _, rows = go(run, 3)
    assert [row["step"] for row in rows] == [3]
    assert "lacks the rows before step 2" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(run):
    before = (run / "metrics.jsonl").read_bytes()
    with locked(run / ".training.lock", "this"), pytest.raises(UserError, match="in use by another process"):
        go(run, 3)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_says_where_it_resumes_and_how_far_it_is(run, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "LINES_EVERY", 0.0)
    go(run, 5)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "tiny: resuming at step 2 of 5"
    assert said[-1].startswith("tiny: 5/5, loss ") and said[-1].endswith(" gone, 0:00 left")
    assert any(line.startswith("tiny: 3/5, loss ") for line in said)
    monkeypatch.setattr(terminal, "LINES_EVERY", 1e9)
    go(run, 6)
    assert capsys.readouterr().err.splitlines() == ["tiny: resuming at step 5 of 6"]  # a short run needs no lines
