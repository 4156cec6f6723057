"""Executes the notebooks and writes each .ipynb from its script, outputs included.

    python scripts/notebooks.py           all of notebooks/
    python scripts/notebooks.py 4         those whose name begins so

notebooks/NAME.py is what people change, a script of `# %%` cells; NAME.ipynb is what GitHub shows. The .ipynb holds
nothing that every run changes: no times, no paths, and ids by place.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbclient
import nbformat
from jupyter_client import AsyncKernelManager
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def scripts() -> list[Path]:
    """The scripts of all notebooks."""
    return sorted(FOLDER.glob("*.py"))


def of_script(text: str) -> NotebookNode:
    """The notebook of a script of `# %%` cells, without outputs."""
    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.update(metadata=METADATA, nbformat=4, nbformat_minor=5)
    for place, cell in enumerate(notebook.cells):
        cell.update(id=f"cell-{place}", metadata={})
    return notebook


def execute(notebook: NotebookNode) -> None:
    """Run all cells in a process and an empty folder of their own, and keep their outputs in the notebook.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed; its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            km=AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel"),  # no ports
            resources={"metadata": {"path": folder}},
            extra_arguments=["--HistoryManager.enabled=False", "--log-level=ERROR"],
            timeout=600,
            record_timing=False,
        )
        client.execute()


def main(names: Sequence[str]) -> int:
    found = [path for path in scripts() if not names or path.name.startswith(tuple(names))]
    if not found:
        print(f"no notebook begins with {' or '.join(names)}; there are {', '.join(p.stem for p in scripts())}")
        return 2
    for path in found:
        notebook = of_script(path.read_text())
        execute(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, path.with_suffix(".ipynb"))
        print(path.with_suffix(".ipynb").relative_to(FOLDER.parent))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main(sys.argv[1:]))
