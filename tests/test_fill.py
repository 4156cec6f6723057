"""Numbers of documents from result files: queries, marks, the command."""

from pathlib import Path

import pytest

from qjax.cli import main
from qjax.errors import UserError
from qjax.report.fill import fill
from qjax.report.query import answer, view
from qjax.report.result import write
from qjax.report.schema import Column, Result, Run, Table

ROWS = Table(
    "rows",
    (Column("name", "name"), Column("bits", "bits", "", 0), Column("kl", "KL", "nats", 3, "half"), Column("on", "on")),
    (
        {"name": "a b", "bits": 2, "kl": 0.5, "half": 0.01, "on": True},
        {"name": "a b", "bits": 3, "kl": 0.25, "half": None, "on": False},
        {"name": "c", "bits": 2, "kl": -0.125, "half": 0.001, "on": False},
        {"name": "c", "bits": 4, "kl": None, "on": False},
    ),
)
RESULTS = {"r": Result("R", "qjax run r.toml", "not recorded: all", Run(), (ROWS,))}


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("r/rows kl name='a b' bits=2", "0.500 ± 0.010"),
        ("r/rows kl name='a b' bits=2 :bare", "0.500"),
        ("r/rows kl on=yes :digits=1", "0.5 ± 1.0e-02"),
        ("r/rows kl name=c bits=2 :times=-1", "0.125 ± 0.001"),
        ("r/rows kl name=c bits=4", "\N{EN DASH}"),
        ("r/rows kl name='a b' bits=2 over name='a b' bits=3", "2.00"),
        ("r/rows kl name='a b' bits=2 minus name='a b' bits=3 :digits=2", "0.25"),
        ("r/rows kl bits=2|3 :of=max", "0.500"),
        ("r/rows kl bits!=2 :of=count", "1"),
        ("r/rows kl :of=mean", "0.208"),
        ("r/rows name bits=3", "a b"),
    ],
)
def test_answer(query, text):
    assert answer(query, RESULTS) == text


def test_view():
    found = view("table r/rows name=who kl=KL:1 where bits!=4 :sort=-kl :digits=2", RESULTS)
    assert [c.title for c in found.columns] == ["who", "KL"]
    assert [c.digits for c in found.columns] == [None, 1]
    assert [row["kl"] for row in found.rows] == [0.5, 0.25, -0.125]
    crossed = view("pivot r/rows kl name bits :bare", RESULTS)
    assert [c.key for c in crossed.columns] == ["name", "2", "3", "4"]
    assert crossed.rows == (
        {"name": "a b", "2": "0.500", "3": "0.250"},
        {"name": "c", "2": "-0.125", "4": "\N{EN DASH}"},
    )


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("r/rows", "FILE/TABLE COLUMN"),
        ("q/rows kl", "result file must be r, got 'q'"),
        ("r/row kl", "did you mean rows"),
        ("r/rows kll", "did you mean kl"),
        ("r/rows kl bits", "no condition"),
        ("r/rows kl bit=2", "column of rows must be"),
        ("r/rows kl bits=2", "2 rows are meant where one must be"),
        ("r/rows kl bits=2 over name=c", "2 numbers are meant"),
        ("r/rows kl bits=7 :of=max", "0 numbers are meant"),
        ("r/rows kl bits=2 :of=most", ":of must be min, max, mean, count"),
        ("r/rows kl :digit=2", "did you mean digits"),
        ("r/rows kl on=yes :digits=two", "whole number"),
        ("r/rows kl name='a", "close it"),
        ("table r/rows kl where bits=9", "no row has bits=9"),
        ("pivot r/rows kl name on", "two rows have name=c and on=no"),
        ("pivot r/rows kl bits", "three columns"),
        ("table r/rows kl=KL:one", "whole number"),
        ("points r/rows bits kl name", "two columns"),
        ("points r/rows bits kl", "a cell of kl is none"),
        ("points r/rows name kl where bits=2", "a cell of name is none"),
    ],
)
def test_what_is_wrong_with_a_query_is_said(query, said):
    with pytest.raises(UserError, match=said):
        (view if query.startswith(("table", "pivot", "points")) else answer)(query, RESULTS)


def test_marks_of_markdown():
    text = "KL <!--= r/rows kl on=yes -->9<!--/-->.\n\n<!--= table r/rows name kl where on=yes -->\n<!--/-->\n"
    made = fill(text, RESULTS, Path("a.md"))
    assert made == (
        "KL <!--= r/rows kl on=yes -->0.500 ± 0.010<!--/-->.\n\n<!--= table r/rows name kl where on=yes -->\n"
        "| name | KL, nats (± 95 %) |\n| --- | --: |\n| a b | 0.500 ± 0.010 |\n<!--/-->\n"
    )
    assert fill(made, RESULTS, Path("a.md")) == made


def test_marks_of_latex():
    text = (
        "KL \\result{r/rows kl on=yes}{} \\result{r/rows kl name=c bits=2}{$\\times 10^{3}$}\n%= table r/rows kl\n%/\n"
    )
    made = fill(text, RESULTS, Path("a.tex"))
    assert (
        "\\result{r/rows kl on=yes}{$0.500 \\pm 0.010$} \\result{r/rows kl name=c bits=2}{$-0.125 \\pm 0.001$}" in made
    )
    assert made.count(r"\\") == 5 and made.endswith("\\end{tabular}\n%/\n")
    assert fill(made, RESULTS, Path("a.tex")) == made


def test_points_of_a_figure():
    text = "\\addplot coordinates {\n%= points r/rows bits kl where bits=2|3 :sort=bits\n%/\n};\n"
    made = fill(text, RESULTS, Path("a.tex"))
    assert "(2,0.5) +- (0,0.01)\n(2,-0.125) +- (0,0.001)\n(3,0.25)\n%/" in made
    assert fill(made, RESULTS, Path("a.tex")) == made


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.md", "\n<!--= r/rows kl on=yes -->9", "a.md: as many marks"),
        ("a.md", "<!--= r/rows kl on=yes -->9 <!--= r/rows kl on=yes --><!--/--><!--/-->", "a.md:1: .*not closed"),
        ("a.md", "\n\n<!--= r/rows kl -->9<!--/-->", "a.md:3: r/rows kl: 4 rows"),
        ("a.md", "<!--= points r/rows bits kl --><!--/-->", "for LaTeX"),
        ("a.tex", "%= r/rows kl on=yes\n%/\n", "number in"),
        ("a.tex", "\\result{table r/rows kl}{}", "table stands between"),
        ("a.txt", "", "a.txt: a document"),
    ],
)
def test_what_is_wrong_with_a_mark_is_said(name, text, said):
    with pytest.raises(UserError, match=said):
        fill(text, RESULTS, Path(name))


def test_command(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    write(RESULTS["r"], tmp_path / "results" / "r.json")
    page = tmp_path / "page.md"
    page.write_text("<!--= r/rows kl on=yes -->0.400<!--/-->\n")
    line = ["fill", str(tmp_path), "--results", str(tmp_path / "results")]
    assert main([*line, "--check"]) == 2
    assert "page.md" in capsys.readouterr().err and "0.400" in page.read_text()
    assert main(line) == 0
    assert page.read_text() == "<!--= r/rows kl on=yes -->0.500 ± 0.010<!--/-->\n"
    assert main([*line, "--check"]) == 0
    assert main(["fill", str(page), "--results", str(tmp_path)]) == 0
    assert main(["fill", str(page), "--results", str(tmp_path / "nothing")]) == 2
    assert main(["fill"]) == 2
