"""`qjax plan`: what it refuses before it works, and a plan that `qjax quantize` takes."""

import pytest

from qjax.budget import size_of_mix
from qjax.cli import main
from qjax.io.checkpoint import load
from qjax.io.gguf_read import read_gguf
from qjax.plan import Plan
from qjax.report.result import read


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", "plan.txt", "--bits", "4"), "a plan is a .toml file"),
        (("-o", "p.toml"), "either --bits"),
        (("-o", "p.toml", "--bits", "4", "--size", "5MB"), "either --bits"),
        (("-o", "p.toml", "--bits", "0"), "above 0"),
        (("-o", "p.toml", "--size", "5 parsec"), "a size such as 80MB"),
        (("-o", "p.toml", "--bits", "4", "--windows", "1"), "2 is the least"),
        (("-o", "p.toml", "--bits", "4", "--calib", "self", "--calib", "x"), "goes with no other"),
        (("-o", "p.toml", "--bits", "4", "--html", "p.toml"), "write"),
    ],
)
def test_mistakes_are_told_before_any_work(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "reference", *options]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_plan_of_a_mixs_size_becomes_a_file_of_that_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("def plan(weights):\n    return sorted(weights)\n" * 60)
    asked = (
        "--size",
        "Q4_0",
        "--formats",
        "Q4_0",
        "Q5_0",
        "Q8_0",
        "--windows",
        "2",
        "--calib-ctx",
        "64",
        "--measured",
        "1",
    )
    told = ("--recipe", "rtn", "--no-mend", "--html", "plan.html", "--json", "plan.json")
    assert main(["plan", "reference", "-o", "plan.toml", "--calib", "book.txt", *asked, *told]) == 0
    assert "budget" in capsys.readouterr().out
    assert {str(rule.format) for rule in Plan.from_toml("plan.toml").rules} <= {"Q4_0", "Q5_0", "Q8_0"}
    tables = {table.name: table for table in read("plan.json").tables}
    assert "Bits by layer" in (tmp_path / "plan.html").read_text()
    assert main(["quantize", "reference", "-o", "plan.gguf", "--plan", "plan.toml"]) == 0
    plan, mix = sum(t.nbytes for t in read_gguf("plan.gguf").tensors.values()), size_of_mix(load("reference"), "Q4_0")
    assert 0.98 * mix < plan <= mix
    (best,) = (row for row in tables["plans"].rows if row["name"] == "budget")
    assert best["bytes"] == plan and best["kl"] < next(r["kl"] for r in tables["plans"].rows if r["name"] == "Q4_0")
