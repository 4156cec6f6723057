"""The notebooks: each runs, says what it claims and asserts it, and is the same in its script and its .ipynb."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(notebooks)

SCRIPTS = notebooks.scripts()
EXACT = ("4_qat_to_gguf",)  # compiled as a user's programs are: its subject is exact bytes
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def asserts(source: str) -> list[ast.Assert]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks_and_every_one_is_a_pair():
    folder = ROOT / "notebooks"
    assert len(SCRIPTS) >= 5
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in folder.glob("*.ipynb"))


@each
def test_script_and_notebook_are_in_step(script):
    """`make notebooks` writes the second from the first."""
    kept = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert cells(kept) == cells(notebooks.of_script(script.read_text())), "run `make notebooks`"


@each
def test_every_claim_is_said_before_it_is_asserted(script):
    notebook = notebooks.of_script(script.read_text())
    claims = [n for n, cell in enumerate(notebook.cells) if cell.cell_type == "code" and asserts(cell.source)]
    assert claims, "a notebook that asserts nothing"
    for n in claims:
        assert notebook.cells[n - 1].cell_type == "markdown", f"cell {n} asserts what no text in front of it says"


@each
def test_outputs_are_of_one_run_and_hold_nothing_of_the_machine(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("<table>" in output.get("data", {}).get("text/html", "") for output in outputs)
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    shown = [{kind: text for kind, text in output.data.items() if kind != "image/png"} for output in outputs]
    assert not re.search(r"/home|/root|/tmp|/usr|0x[0-9a-f]{6}|\d\d:\d\d", json.dumps(shown))
    assert script.with_suffix(".ipynb").stat().st_size < 100_000


@pytest.mark.parametrize("script", [pytest.param(p, id=p.stem, marks=pytest.mark.slow) for p in SCRIPTS])
def test_every_assertion_holds(script, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if script.stem in EXACT else "1")
    notebook = notebooks.of_script(script.read_text())
    notebooks.execute(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_a_claim_that_is_wrong_fails():
    with pytest.raises(CellExecutionError, match=": two"):
        notebooks.execute(notebooks.of_script('# %% [markdown]\n# One is two.\n\n# %%\nassert 1 == 2, "two"\n'))
