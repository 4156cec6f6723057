"""Documents hold no number that a result file could give: marks are filled in, and nothing beside them is typed."""

import re
from pathlib import Path

import pytest

from qjax.cli import main
from qjax.report.fill import documents, fill
from qjax.report.result import read

ROOT = Path(__file__).parents[1]
RESULTS = {p.stem: read(p) for p in sorted((ROOT / "experiments" / "results").rglob("*.json"))}
DOCUMENTS = documents([ROOT / "README.md", ROOT / "docs"])
MEASURED = [ROOT / "README.md", ROOT / "docs" / "log.md", *documents([ROOT / "docs" / "results"])]
HEADS = sorted((ROOT / "configs").rglob("*.toml"))

SAID = re.compile(r"\b[\d.]+ [MB]\b|95 %")  # how large a model is, and what an interval covers
TYPED = re.compile(r"\d\.\d|\d ?%|± ?\d")
NUMBER = re.compile(r"(?<![\w.])\d+\.\d\d+|\d ?%|\+-|±")  # of a comment, where 0.1 is a setting


def without_code(text: str) -> str:
    """Text without fences, indented blocks, code, links, marks and their content."""
    text = re.sub(r"<!--=.*?<!--/-->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"^    .*$|`[^`]*`|\]\([^)]*\)", "", text, flags=re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.stem)
def test_numbers_are_what_the_result_files_say(path):
    assert fill(path.read_text(), RESULTS, path) == path.read_text(), "run: make results"


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.stem)
def test_no_number_is_typed(path):
    found = [line for line in without_code(path.read_text()).splitlines() if TYPED.search(SAID.sub("", line))]
    assert not found, f"{path}: {found}: give its query, <!--= FILE/TABLE COLUMN KEY=VALUE --><!--/-->"


@pytest.mark.parametrize("path", HEADS, ids=lambda p: p.stem)
def test_heads_of_configs_point_at_results(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#") and NUMBER.search(line)]
    assert not head, f"{path}: {head}: a result page has the number"
    for page in re.findall(r"docs/results/\w+\.md", path.read_text()):
        assert (ROOT / page).is_file(), f"{path}: {page}"


@pytest.mark.parametrize(("result", "figure"), [("quickstart", "kl"), ("smollm2_text", "amount")])
def test_a_picture_is_what_the_result_file_draws(result, figure, tmp_path):
    made = tmp_path / f"{figure}.svg"
    assert main(["report", str(ROOT / f"experiments/results/{result}.json"), "--figure", figure, "-o", str(made)]) == 0
    assert made.read_text() == (ROOT / f"docs/img/{figure}.svg").read_text(), "run: make results"


def test_what_cannot_be_traced_to_a_commit_is_said():
    for name in (name for name, result in RESULTS.items() if result.run.commit is None or result.run.changed):
        pages = [p.read_text() for p in documents([ROOT / "docs" / "results"])]
        assert any(f"results/{name}.json" in page and "no commit" in page for page in pages), name


def test_every_result_file_is_shown_on_a_page():
    shown = " ".join(page.read_text() for page in documents([ROOT / "docs"]))
    assert not [name for name in RESULTS if f"results/{name}.json" not in shown]
