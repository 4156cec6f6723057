"""The table of scripts/mutate.py fits the code, and the script tells a killed mutant from one that survives."""

import dataclasses
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))  # where the table lies
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
    assert re.search(message, line)


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
    said = capsys.readouterr().err
    assert said.startswith("no mutant permute-reversd; there are: ") and "rescale-no-op, permute-reversed, " in said


@pytest.fixture
def small(tmp_path):
    """A tree of one function with one feature, and a test that asserts half of it."""
    for folder in ("tree/qjax", "tree/tests", "tree/configs", "copy"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tree/qjax/a.py").write_text("def f(x):\n    return abs(x) + 1\n")
    test = "import qjax.a\n\n\ndef test_f():\n    assert qjax.a.f(-3) > 2\n"
    (tmp_path / "tree/tests/test_a.py").write_text(test)
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "tree")
    return tmp_path


def test_the_three_verdicts_on_a_copy(small, capsys):
    feature = {
        "asserted": ("abs(x)", "x"),
        "forgotten": (" + 1", ""),
        "broken": ("abs(x)", "abs(y)"),
    }
    mutants = [mutate.Mutant(name, "a.py", *change, "test_a.py::test_f") for name, change in feature.items()]
    tree = small / "tree"
    assert not mutate.stale(tree, mutants)
    assert mutate.run(mutants, mutate.copied(tree, small / "copy")) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {words[3]: (words[0], words[-1]) for words in lines[2:5]}
    assert found["asserted"] == ("killed", "test_f") and found["forgotten"][0] == "SURVIVED"
    assert found["broken"][0] == "CRASHED"
    assert "abs(x) + 1" in (tree / "qjax/a.py").read_text() and "abs(x) + 1" in (small / "copy/qjax/a.py").read_text()


@pytest.mark.slow
def test_a_feature_taken_away_from_the_real_tree_is_noticed(tmp_path, capsys):
    assert mutate.run([CHEAP], mutate.copied(ROOT, tmp_path)) == 0
    assert "1 killed, 0 survived, 0 crashed" in capsys.readouterr().out
