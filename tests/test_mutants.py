"""The table of scripts/mutate.py fits the code, and the script tells a killed mutant from one that survives."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
mutate = sys.modules["mutate"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)
CHEAP = next(m for m in mutate.MUTANTS if m.name == "permute-reversed")


def test_the_table_fits_the_code():
    assert not mutate.stale(ROOT)
    names = [m.name for m in mutate.MUTANTS]
    assert len(set(names)) == len(names) and not any(" " in name for name in names)
    assert all(m.old != m.new for m in mutate.MUTANTS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"old": "no such text"}, "has 'no such text' 0 times"),
        ({"old": "order"}, "times; the table wants a text that it has once"),
        ({"tests": "reparam/test_reparam_gains.py::test_gone[h]"}, "there is no test .*test_gone"),
        ({"path": "reparam/gone.py"}, "qjax/reparam/gone.py has .* 0 times"),
    ],
)
def test_what_no_longer_fits_is_named(change, message):
    (line,) = mutate.stale(ROOT, [dataclasses.replace(CHEAP, **change)])
    assert __import__("re").search(message, line)


@pytest.mark.parametrize(
    "status, output, verdict",
    [
        (0, "1 passed", "SURVIVED"),
        (1, "FAILED tests/a/test_b.py::test_c[d] - assert 3 < 2", "killed"),
        (1, "FAILED tests/a/test_b.py::test_c - AssertionError: ", "killed"),
        (1, "FAILED tests/a/test_b.py::test_c - NameError: name 'h' is not defined", "CRASHED"),
        (2, "ERROR tests/a/test_b.py - SyntaxError: invalid syntax", "CRASHED"),
        (5, "no tests ran", "CRASHED"),
    ],
)
def test_only_a_failed_assertion_kills(status, output, verdict):
    assert mutate.judged(status, output)[0] == verdict


def test_a_name_that_is_not_there_is_told(capsys):
    assert mutate.main(["--only", "permute-reversd"]) == 2
    assert "no mutant permute-reversd; there are: rescale-no-op, permute-reversed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_feature_taken_away_is_noticed_and_one_that_stays_is_not(tmp_path, capsys):
    """On a copy: the tree itself stays as it is."""
    path = ROOT / CHEAP.file
    before = path.read_bytes()
    still_there = dataclasses.replace(CHEAP, name="still-there", new=CHEAP.old + "  # the same")
    assert mutate.run([CHEAP, still_there], mutate.copied(ROOT, tmp_path)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("killed") and "permute-reversed" in lines[2] and "test_permute_puts" in lines[2]
    assert lines[3].startswith("SURVIVED") and "still-there" in lines[3]
    assert path.read_bytes() == before
