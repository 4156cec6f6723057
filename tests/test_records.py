"""Records fall to what is better on every calibration text and not by chance; the history keeps what fell."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from test_cli_models import make_folder

from qjax.cli import main
from qjax.cli.run import load_script
from qjax.config import read as read_config
from qjax.evaluate.intervals import chance_of_gain
from qjax.report.result import read

CONFIG = Path(__file__).parents[1] / "configs" / "records.toml"
records, _ = load_script(read_config(CONFIG))
FACTS = {"commit": "c", "date": "2026-01-01", "config": "records.toml"}


@pytest.mark.parametrize("count", [1, 5, 8])
def test_the_chance_of_a_gain_is_that_of_all_signs(count):
    d = np.random.default_rng(count).normal(-0.5, 1, count)
    sums = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product([1, -1], repeat=count)]
    assert chance_of_gain(d) == pytest.approx(np.mean([s <= sum(d) + 1e-9 for s in sums]))


def test_drawn_signs_are_as_rare_as_all_of_them():
    d = np.random.default_rng(0).normal(-0.1, 1, 16)
    exact = chance_of_gain(d)
    assert 0.02 < exact < 0.98 and chance_of_gain([*d, 0.0]) == pytest.approx(exact, abs=0.01)
    assert chance_of_gain([-1.0] * 40) == pytest.approx(2**-16) and chance_of_gain([1.0] * 40) == 1


def runs(**entries):
    """Rows of entries (bits, KL of each of two texts), of windows that differ far more than the entries do."""
    windows = np.linspace(1, 9, 8)
    return [
        {"recipe": name, "seed": seed, "layer_bits": bits, "windows": (windows + kl).tolist()}
        for name, (bits, *kls) in entries.items()
        for seed, kl in enumerate(kls)
    ]


def fallen(history=(), **entries):
    return records.challenge(runs(**entries), tuple(entries), (2.0, 3.0), 0.05, history, FACTS)


def test_a_record_falls_to_a_paired_gain_on_every_text_alone():
    entries = {"first": (2.5, 0.5, 0.5), "mixed": (2.5, 0.1, 0.6), "better": (2.5, 0.4, 0.45), "worse": (2.5, 0.9, 0.9)}
    rows = fallen(**entries)
    assert [(r["recipe"], r["at_most_bits"], r["before"]) for r in rows] == [
        ("first", 3.0, None),
        ("better", 3.0, "first"),
    ]
    assert rows[0]["p_value"] is None and rows[1]["p_value"] == pytest.approx(2**-8)
    assert rows[1]["kl"] == pytest.approx(5.425) and rows[1]["date"] == "2026-01-01"


def test_fewer_bits_hold_more_classes_and_a_standing_record_is_not_its_own_rival():
    rows = fallen([{"at_most_bits": 3.0, "recipe": "old"}], old=(3.0, 0.5, 0.5), small=(1.7, 0.4, 0.4), big=(3.1, 0, 0))
    assert [(r["recipe"], r["at_most_bits"], r["before"]) for r in rows] == [
        ("small", 2.0, None),
        ("small", 3.0, "old"),
    ]


@pytest.mark.slow
def test_a_run_writes_the_history_once_and_judges_it_again_the_next_time(tmp_path, capsys):
    history = tmp_path / "records.json"
    model = make_folder(tmp_path / "tiny")
    line = ["run", str(CONFIG), "--smoke", "--model", str(model), "--history", str(history), "--context", "32"]
    assert main([*line, "--tokens", "256", "--entries", "rtn:uint2_g32", "--out", str(tmp_path / "a")]) == 0
    (table,) = read(history).tables
    assert [(r["recipe"], r["at_most_bits"]) for r in table.rows] == [("rtn:uint2_g32", m) for m in (3.0, 4.0, 4.5)]
    before = history.read_bytes()
    assert main([*line, "--tokens", "256", "--entries", "rtn:uint4_g32", "--out", str(tmp_path / "b")]) == 0
    assert history.read_bytes() == before  # above all classes
    found = json.loads((tmp_path / "b" / "results.json").read_text())
    assert {r["recipe"] for r in found["rows"]} == {"rtn:uint2_g32", "rtn:uint4_g32"}
    assert "0 new records" in capsys.readouterr().out.splitlines()[-1]
