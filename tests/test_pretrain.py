"""The pretraining loop: a killed run continues to the same bits; its folder is a model that loads."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from qjax.cli.run import load_script
from qjax.config import read
from qjax.models import stdlib_text
from qjax.training.run.data import Batches

pretrain, _ = load_script(read(Path(__file__).parents[1] / "configs" / "pretrain_reference.toml"))

CONFIG = pretrain.Config(
    vocab=300, dim=32, hidden=64, layers=2, heads=2, kv_heads=1, context=32, steps=6, batch=2, warmup=2, peak_rate=2e-2,
    log_every=1, eval_every=6, checkpoint_every=3, eval_windows=2,
)  # fmt: skip


@pytest.fixture
def small_text(monkeypatch):
    files = stdlib_text.training_files()[:6]
    monkeypatch.setattr(stdlib_text, "train_text", lambda: stdlib_text._read(files))
    monkeypatch.setattr(stdlib_text, "heldout_text", lambda: "def f(x):\n    return x + 1\n" * 40)


def rows(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


@pytest.mark.slow
def test_resumes_exactly(tmp_path, monkeypatch, small_text):
    whole = pretrain.run(CONFIG, tmp_path / "whole")
    batch_at = Batches.batch_at

    def killed(batches, step, *orders, **named):
        if step == 4:
            raise KeyboardInterrupt
        return batch_at(batches, step, *orders, **named)

    monkeypatch.setattr(Batches, "batch_at", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(CONFIG, tmp_path / "broken")
    monkeypatch.setattr(Batches, "batch_at", batch_at)
    resumed = pretrain.run(CONFIG, tmp_path / "broken")

    assert resumed["heldout_loss"] == whole["heldout_loss"]
    done = rows(tmp_path / "whole")
    assert [row["step"] for row in done] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in resumed["curve"]] == [row["loss"] for row in done]
    assert rows(tmp_path / "broken") == done
    a, b = (qjax.load(tmp_path / name / "model") for name in ("whole", "broken"))
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.tokenizer.decode(a.tokenizer.encode("def f(x): return x")) == "def f(x): return x"
    assert done[-1]["loss"] < done[0]["loss"]


def test_heldout_modules_are_never_trained_on():
    names = {path.relative_to(stdlib_text.stdlib_root()).as_posix() for path in stdlib_text.training_files()}
    assert len(names) > 300
    assert not names & set(stdlib_text.HELDOUT)
    assert len(stdlib_text.heldout_text()) > 500_000
    text = stdlib_text.calibration_text(50_000)
    assert len(text) == 50_000 and text == stdlib_text.calibration_text(50_000)
    assert text != stdlib_text.calibration_text(50_000, seed=1)
