"""Records fall to what is better on every calibration text and not by chance; the history keeps what fell."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli_models import make_folder

from qjax.cli import main
from qjax.cli.run import load_script
from qjax.config import read as read_config
from qjax.report.result import read

CONFIG = Path(__file__).parents[1] / "configs" / "records.toml"
records, _ = load_script(read_config(CONFIG))
FACTS = {"commit": "c", "date": "2026-01-01", "config": "records.toml"}


def runs(**entries):
    """Rows of entries (bits, KL of each of two texts), of windows that differ far more than the entries do."""
    windows = np.linspace(1, 9, 8)
    return [
        {"line": name, "seed": seed, "layer_bits": bits, "windows": (windows + kl).tolist()}
        for name, (bits, *kls) in entries.items()
        for seed, kl in enumerate(kls)
    ]


def fallen(history=(), **entries):
    return records.challenge(runs(**entries), tuple(entries), (2.0, 3.0), 0.05, history, FACTS)


def test_a_record_falls_to_a_paired_gain_on_every_text_alone():
    entries = {"first": (2.5, 0.5, 0.5), "mixed": (2.5, 0.1, 0.6), "better": (2.5, 0.4, 0.45), "worse": (2.5, 0.9, 0.9)}
    rows = fallen(**entries)
    assert [(r["line"], r["at_most_bits"], r["before"]) for r in rows] == [
        ("first", 3.0, None),
        ("better", 3.0, "first"),
    ]
    assert rows[0]["p_value"] is None and rows[1]["p_value"] == pytest.approx(2**-8)
    assert rows[1]["kl"] == pytest.approx(5.425) and rows[1]["date"] == "2026-01-01"


def test_fewer_bits_hold_more_classes_and_a_standing_record_is_not_its_own_rival():
    rows = fallen([{"at_most_bits": 3.0, "line": "old"}], old=(3.0, 0.5, 0.5), small=(1.7, 0.4, 0.4), big=(3.1, 0, 0))
    assert [(r["line"], r["at_most_bits"], r["before"]) for r in rows] == [
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
    assert {r["line"] for r in table.rows} == {"uint2_g32 >> nearest(weight='none')"}
    before = history.read_bytes()
    assert main([*line, "--tokens", "256", "--entries", "rtn:uint4_g32", "--out", str(tmp_path / "b")]) == 0
    assert history.read_bytes() == before  # above all classes
    found = json.loads((tmp_path / "b" / "results.json").read_text())
    assert {r["recipe"] for r in found["rows"]} == {"rtn:uint2_g32", "rtn:uint4_g32"}
    assert "0 new records" in capsys.readouterr().out.splitlines()[-1]
