"""Result files and what is made of them: tables, the page, the command."""

import dataclasses
import html
import html.parser
import json
import math
import re
from pathlib import Path

import pytest

from qjax.cli import main
from qjax.errors import UserError
from qjax.report.build import build
from qjax.report.page import page
from qjax.report.result import read, write
from qjax.report.run_page import write_run_page
from qjax.report.schema import Column, Result, Run, Table
from qjax.report.tables import MISSING, html_table, latex, markdown, number

FILES = sorted((Path(__file__).parents[1] / "experiments" / "results").rglob("*.json"))
NASTY = "a_b|<i>&50% \\ $#{~^`*"

SMALL = Table(
    "rows",
    (
        Column("name", "name"),
        Column("kl", "KL", "nats", 4, "kl_half_interval"),
        Column("share", "share", "%", 1),
        Column("fused", "fused"),
    ),
    (
        {"name": NASTY, "kl": 0.25, "kl_half_interval": 0.0125, "share": 50, "fused": True},
        {"name": "b", "kl": 0.00002, "kl_half_interval": None, "share": None},
    ),
)
RESULT = Result("Small <results>", "qjax run a.toml --name '<b>'", "not recorded: <u>all</u> & more", Run(), (SMALL,))


def test_markdown():
    assert markdown(SMALL) == (
        "| name | KL, nats (± 95 %) | share, % | fused |\n"
        "| --- | --: | --: | --- |\n"
        "| a\\_b\\|\\<i\\>\\&50% \\\\ $\\#{\\~^\\`\\* | 0.2500 ± 0.0125 | 50.0 | yes |\n"
        f"| b | 2.0e-05 | {MISSING} | {MISSING} |\n"
    )


def test_latex():
    assert latex(SMALL) == (
        "\\begin{tabular}{lrrl}\n\\toprule\n"
        "name & KL, nats ($\\pm$ 95 \\%) & share, \\% & fused \\\\\n\\midrule\n"
        "a\\_b|\\textless{}i\\textgreater{}\\&50\\% \\textbackslash{} \\$\\#\\{\\textasciitilde{}\\textasciicircum{}`* "
        "& $0.2500 \\pm 0.0125$ & $50.0$ & yes \\\\\n"
        "b & $2.0 \\times 10^{-5}$ & -- & -- \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_html():
    name = "a_b|&lt;i&gt;&amp;50% \\ $#{~^`*"
    assert html_table(SMALL) == (
        "<table><thead><tr><th class=text><button>name</button></th><th><button>KL, nats (± 95 %)</button></th>"
        "<th><button>share, %</button></th><th class=text><button>fused</button></th></tr></thead><tbody>\n"
        f'<tr><td class=text data-key="{name}">{name}</td><td data-key="0.25">0.2500 ± 0.0125</td>'
        '<td data-key="50">50.0</td><td class=text data-key="True">yes</td></tr>\n'
        '<tr><td class=text data-key="b">b</td><td data-key="2e-05">2.0e-05</td>'
        f'<td data-key="">{MISSING}</td><td class=text data-key="">{MISSING}</td></tr>\n</tbody></table>'
    )


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0.000"),
        (-1.5, 1, "-1.5"),
        (7, 0, "7"),
        (3e8, 0, "300000000"),
        (3e8, 2, "3.0e+08"),
        (0.004, 2, "4.0e-03"),
    ],
)
def test_numbers_keep_figures(value, digits, text):
    assert number(value, digits) == text


def test_a_standard_error_is_called_one():
    table = Table("t", (Column("kl_mean", "KL", "nats", 3, "kl_mean_se"),), ({"kl_mean": 0.25, "kl_mean_se": 0.01},))
    assert "KL, nats (± s.e.)" in markdown(table)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_committed_results_follow_the_schema(path, tmp_path):
    result = read(path)
    assert "qjax" in result.command and result.title and any(table.rows for table in result.tables)
    write(result, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_what_is_not_recorded_is_null_and_said():
    made = build({"rows": [{"a": 1.0}]}, title="t", command="qjax run t.toml")
    assert made.run.commit is None and made.note.startswith("not recorded: commit, changed, machine")
    for path in FILES:
        result = read(path)
        for fact in dataclasses.asdict(result.run):
            assert getattr(result.run, fact) is not None or re.search(rf"not recorded: .*\b{fact}\b", result.note), path


def _damage(found, *keys, value=None):
    at = found
    for key in keys[:-1]:
        at = at[key]
    if value is None:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value


NAN = float("nan")
DAMAGES = [
    (("schema",), 2, "schema must be 1, got 2"),
    (("schema",), True, "schema must be 1"),
    (("command",), None, "command must be there"),
    (("command",), " ", "command must be the command line"),
    (("note",), "", "note must be a reason why run has no commit"),
    (("author",), "me", "author must be one of title"),
    (("run", "commit"), 5, "run.commit must be text or null"),
    (("run", "machine"), {"load": NAN}, "run.machine.load must be text or a finite number"),
    (("tables",), {}, "tables must be a list"),
    (("tables", 0, "name"), "", "tables.0.name must be text"),
    (("tables", 0, "columns", 1, "digits"), -1, r"tables.0 \(rows\).columns.1.digits must be 0 to 17"),
    (("tables", 0, "columns", 1, "key"), "name", "name must be a key of its own"),
    (("tables", 0, "columns", 1, "unit"), 3, "columns.1.unit must be text"),
    (("tables", 0, "columns", 1, "interval"), "se", "kl_half_interval must be one of the columns"),
    (("tables", 0, "rows", 0, "new"), 1.0, r"\(rows\).rows.0.new must be one of the columns"),
    (("tables", 0, "rows", 0, "kl"), NAN, r"\(rows\).rows.0.kl must be a finite number or null, got 'nan'"),
    (("tables", 0, "rows", 0, "kl"), float("inf"), "rows.0.kl must be a finite number"),
    (("tables", 0, "rows", 0, "kl"), "0.25", "rows.0.kl must be a finite number or null, got '0.25'"),
    (("tables", 0, "rows", 0, "kl"), True, "rows.0.kl must be a finite number"),
    (("tables", 0, "rows", 0, "name"), 3, "rows.0.name must be text or null"),
    (("tables", 0, "rows", 0, "fused"), None, r"\(rows\).columns: fused must be a key of some row"),
    (("tables", 0, "rows", 0), [1], "rows.0 must be an object"),
]


@pytest.mark.parametrize(("keys", "value", "said"), DAMAGES, ids=str)
def test_damage_is_one_line_with_file_and_key(tmp_path, keys, value, said):
    path = tmp_path / "bad.json"
    write(RESULT, path)
    found = json.loads(path.read_text())
    _damage(found, *keys, value=value)
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"schema": "1"}', "[" * 100_000])
def test_what_is_no_result_file_is_refused(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json.* schema"):
        read(tmp_path / "bad.json")


def test_nothing_that_breaks_the_schema_is_written(tmp_path):
    broken = dataclasses.replace(RESULT, command="")
    with pytest.raises(UserError, match="command"):
        write(broken, tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


class Elements(html.parser.HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_has_every_table():
    named = dataclasses.replace(RESULT, tables=(dataclasses.replace(SMALL, name="<u>rows</u>"),))
    results = [*map(read, FILES[::3]), named]
    made = Elements(page(results))
    tags = [tag for tag, _ in made.tags]
    assert tags.count("table") == sum(len(r.tables) for r in results) and tags.count("section") == len(results)
    assert not {"link", "img", "iframe", "object", "i", "b", "u"} & set(tags)
    for tag, attrs in made.tags:
        assert "src" not in attrs and str(attrs.get("href", "#")).startswith("#"), tag
    assert "@import" not in made.text and "url(" not in made.text
    for result in results:
        assert all(text in made.text for text in (result.title, result.command, result.note))
    assert NASTY in made.text and tags.count("svg") >= 2


def test_the_page_of_a_run_stands_in_its_folder(tmp_path):
    (tmp_path / "manifest.json").write_text('{"command": ["qjax", "run", "<a>.toml"], "git": {"commit": "abc"}}')
    (tmp_path / "config.toml").write_text('x = "<y>"')
    rows = [{"name": "a", "whole_bits": 4.0, "kl": 0.1, "took": math.inf}, {"name": "b", "whole_bits": 3.0, "kl": 0.2}]
    assert write_run_page(tmp_path, {"rows": rows}, title="A & B", note="idle") == tmp_path / "report.html"
    made = Elements((tmp_path / "report.html").read_text())
    assert [tag for tag, _ in made.tags].count("figure") == 2 and "qjax run '<a>.toml'" in made.text
    assert "commit abc" in made.text and 'x = "<y>"' in made.text and "A & B" in made.text and "idle" in made.text


def test_a_run_becomes_a_result_file_and_is_shown(tmp_path, capsys):
    run = tmp_path / "demo"
    run.mkdir()
    manifest = {
        "command": ["qjax", "run", "a b.toml"], "git": {"commit": "abc", "changed": True}, "platform": "Linux",
        "cpu_count": 2, "device": {"kind": "cpu"}, "versions": {"jax": "1"}, "seeds": {"seed": 3},
    }  # fmt: skip
    found = {
        "rows": [{"name": "x", "loss": 3.25, "loss_se": 0.5, "runs": [1.0, 2.0, 3.0], "shape": [4, 8]}],
        "median": {"x": {"seconds": 1.5}}, "weights": 12, "losses": {"trained": 2.5},
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "results.json").write_text(json.dumps(found))
    out = tmp_path / "demo.json"
    assert main(["report", str(run), "-o", str(out), "--title", "Demo", "--note", "idle"]) == 0
    result = read(out)
    assert (result.title, result.note, result.command) == ("Demo", "idle", "qjax run 'a b.toml'")
    assert result.run == Run("abc", True, {"platform": "Linux", "cores": 2}, {"kind": "cpu"}, {"jax": "1"}, {"seed": 3})
    assert [table.name for table in result.tables] == ["rows", "rows.runs", "median", "losses", "values"]
    rows, runs = result.tables[:2]
    assert rows.columns[1] == Column("loss", "loss", "nats", 4, "loss_se")
    assert rows.rows == ({"name": "x", "loss": 3.25, "loss_se": 0.5, "shape.0": 4, "shape.1": 8},)
    assert [row["runs"] for row in runs.rows] == [1.0, 2.0, 3.0] and {row["of"] for row in runs.rows} == {"x"}
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "## Demo" in shown and "| x | 3.2500 ± 0.5000 | 4 | 8 |" in shown
    for name, start in [("a.md", "## Demo"), ("a.tex", "% Demo: rows"), ("a.html", "<!doctype html>")]:
        assert main(["report", str(tmp_path / "demo.json"), "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_text().startswith(start)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give result files"),
        (["nothing.json"], "nothing.json"),
        (["."], "neither result files"),
        (["a.json", "-o", "a.pdf"], "unknown suffix '.pdf'"),
        (["a.json", "--format", "markdown"], "--format must be md, latex, html"),
        (["a.json", "a.json", "-o", "b.json"], "holds one result, got 2"),
        (["a.json", "-o", "b.svg"], "say which figure, as in --figure kl"),
        (["a.json", "--figure", "kl"], "-o FILE.svg holds a figure alone"),
        (["a.json", "-o", "b.svg", "--figure", "pie"], "--figure must be kl, perplexity, rates, amount"),
        (["a.json", "-o", "b.svg", "--figure", "kl"], "it needs rows with whole_bits, kl or kl_mean"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, capsys, argv, said):
    write(RESULT, tmp_path / "a.json")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if argv == ["."] else tmp_path)
    assert main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_folders_are_looked_through_and_runs_in_them_are_one_result_each(tmp_path, capsys):
    (tmp_path / "gpu").mkdir()
    (tmp_path / "sweep" / "run" / "model").mkdir(parents=True)
    write(RESULT, tmp_path / "gpu" / "a.json")
    (tmp_path / "sweep" / "run" / "model" / "config.json").write_text("{}")
    (tmp_path / "sweep" / "run" / "manifest.json").write_text('{"command": ["qjax"]}')
    assert main(["report", str(tmp_path)]) == 2  # it is not done
    assert "results.json" in capsys.readouterr().err
    (tmp_path / "sweep" / "run" / "results.json").write_text('{"loss": 1.5}')
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.findall("^## (.*)", shown, re.M) == ["Small \\<results\\>", "run"] and "commit not recorded" in shown
    assert main(["report", str(tmp_path / "sweep"), "-o", str(tmp_path / "b.json"), "--note", "idle"]) == 0
    assert read(tmp_path / "b.json").note == "idle; not recorded: commit, changed, machine, device, versions, seeds"


def test_keys_become_columns_with_units():
    rows = [{"kl_mean": 0.1, "kl_mean_se": 0.1, "kl_p99": 0.5, "dense_seconds": 1.25, "peak_rss_mb": 3.5, "count": 2,
             "same_top_percent": 90.0, "loss": 0.01, "heldout_loss": 0.01, "odd_share": 0.5, "what": "x"}]  # fmt: skip
    (table,) = build(rows, title="t", command="c").tables
    assert {c.key: (c.title, c.unit, c.digits) for c in table.columns} == {
        "kl_mean": ("KL", "nats", 6), "kl_p99": ("KL p99", "nats", 1), "dense_seconds": ("dense", "s", 2),
        "peak_rss_mb": ("peak rss", "MB", 1), "count": ("count", "", 0), "same_top_percent": ("same top token", "%", 2),
        "loss": ("relative loss", "", 6), "heldout_loss": ("held-out relative loss", "", 6),
        "odd_share": ("odd share", "", 1), "what": ("what", "", None),
    }  # fmt: skip
    (table,) = build({"losses": {"float": 3.0, "odd": 3.25}}, title="t", command="c").tables
    assert [c.unit for c in table.columns] == ["nats", "nats"]


def test_the_interval_over_windows_is_preferred_and_what_holds_only_facts_is_the_run():
    rows = [{"name": "x", "nll": 3.0, "nll_se": 0.1, "nll_se_clustered": 0.2, "runs": [1.0, 2.0, 3.0]}] * 2
    found = {"rows": rows, "cores": 2, "versions": {"jax": "1", "machine": "x86_64"}}
    result = build(found, title="t", command="c", note="idle.")
    assert [(c.key, c.interval) for c in result.tables[0].columns][1:] == [
        ("nll", "nll_se_clustered"),
        ("nll_se", None),
    ]
    assert [row["of"] for row in result.tables[1].rows] == [
        "1",
        "1",
        "1",
        "2",
        "2",
        "2",
    ]  # names that are not their own
    assert result.run == Run(machine={"architecture": "x86_64", "cores": 2}, versions={"jax": "1"})
    assert result.note == "idle; not recorded: commit, changed, device, seeds"
