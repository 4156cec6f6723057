"""The paper: its numbers are those of the result files, none is typed, every citation has its entry, and it builds."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from qjax.cli import main
from qjax.report.fill import LATEX

ROOT = Path(__file__).parents[1]
PAPER, RESULTS = ROOT / "paper", ROOT / "experiments" / "results"
TEXTS = {path.name: path.read_text("utf-8") for path in sorted(PAPER.glob("*.tex"))}

# Decimals and percentages that no experiment measured.
TYPED = {
    r"H+0.05\,\mathrm{diag}(H)": "the damping, a formula of the algebra",
    r"95\,\%": "how sure an interval is",
    "compat=1.17": "a version of pgfplots",
    "at={(0.5,-0.2)}": "where a legend stands",
}
LENGTH = r"\d*\.?\d+ *(?:mm|pt|em|ex|fil|\\linewidth)"


def typed(text: str) -> list[str]:
    """The decimals and percentages of a document outside of what `qjax fill` writes, comments and lengths."""
    text = LATEX.sub("", text)
    text = re.sub(r"(?<!\\)%.*", "", text)
    for known in TYPED:
        text = text.replace(known, "")
    return re.findall(r"\d+[.,]\d+|\d+[ ~$]*(?:\\,)?\\%", re.sub(LENGTH, "", text))


def cited(text: str) -> set[str]:
    return {key.strip() for keys in re.findall(r"\\cite\w*\{([^}]*)\}", text) for key in keys.split(",")}


def test_the_numbers_are_those_of_the_result_files(tmp_path, capsys):
    assert main(["fill", str(PAPER), "--results", str(RESULTS), "--check"]) == 0
    first = re.search(r"\\result\{[^{}]*\}\{\$(\d)", TEXTS["study.tex"])
    other = str((int(first[1]) + 1) % 10)
    changed = TEXTS["study.tex"][: first.start(1)] + other + TEXTS["study.tex"][first.end(1) :]
    (tmp_path / "study.tex").write_text(changed, "utf-8")
    assert main(["fill", str(tmp_path), "--results", str(RESULTS), "--check"]) == 2
    assert "study.tex: not what the result files say" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEXTS)
def test_no_number_is_typed(name):
    assert typed(TEXTS[name]) == []


def test_a_typed_number_is_found():
    text = "A loss of 0.5, $34\\,\\%$ or 7\\%. % 8.9\n\\vspace{1.5em}\n"
    text += "\\result{r/rows kl}{$0.25$}\n%= table r/rows kl\n6.7\n%/\n"
    assert typed(text) == ["0.5", "34\\,\\%", "7\\%"]
    assert all(any(known in text for text in TEXTS.values()) for known in TYPED)


def test_every_citation_has_an_entry_and_every_entry_is_cited():
    entries = re.findall(r"^@\w+\{([^,\s]+),", (PAPER / "references.bib").read_text("utf-8"), re.M)
    assert len(entries) == len(set(entries))
    assert set().union(*map(cited, TEXTS.values())) == set(entries)


def test_every_part_is_read():
    parts = re.findall(r"\\input\{(\w+)\}", TEXTS["main.tex"])
    assert sorted([*(f"{part}.tex" for part in parts), "main.tex"]) == sorted(TEXTS)


@pytest.mark.slow
def test_it_builds(tmp_path):
    if shutil.which("latexmk") is None:
        pytest.skip("latexmk is not on this machine")
    line = ["latexmk", "-cd", "-pdf", "-interaction=nonstopmode", "-halt-on-error", f"-outdir={tmp_path}"]
    made = subprocess.run(
        [*line, str(PAPER / "main.tex")], capture_output=True, text=True, errors="replace", timeout=300
    )
    assert made.returncode == 0, made.stdout[-2000:]
    log, aux = ((tmp_path / f"main.{end}").read_text("utf-8", "replace") for end in ("log", "aux"))
    assert not re.search(r"There were undefined|multiply.defined", log)
    assert [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", log) if float(points) > 10] == []
    appendix = re.search(r"\\newlabel\{sec:appendix\}\{\{A\}\{(\d+)\}", aux)
    assert int(appendix[1]) <= 9, "at most 8 pages stand before the appendix, which begins on a page of its own"
