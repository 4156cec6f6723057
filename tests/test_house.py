"""The house itself: imports run downhill, examples in docs and docstrings are true, every config names real keys."""

import ast
import builtins
import dis
import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import jax
import pytest

import qjax

ROOT = Path(__file__).parents[1]

# Each layer may import itself and the layers before it.
LAYERS = [
    {"chain", "compiled", "errors", "html_page", "processes", "tables", "terminal", "typing"},
    {"formats"},
    {"kernels"},
    {"stats"},
    {"reparam"},
    {"rounding"},
    {"recipes"},
    {"tensor"},
    {"prepacking"},
    {"lifting"},
    {"tokenizer"},
    {"models"},
    {"io"},
    {"calibrate"},
    {"evaluate"},
    {"plan"},
    {"pipeline"},
    {"budget"},
    {"training"},
    {"config", "rundir", "runs", "sweep"},
    {"report"},
    {"bench"},
    {"cli", "__main__"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}

MODULES = sorted(m.name for m in pkgutil.walk_packages(qjax.__path__, "qjax.") if m.name != "qjax.__main__")


def imported(path: Path) -> set[str]:
    """The parts of qjax a file imports (`qjax.io.atomic` -> `io`), type-checking imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qjax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("qjax.")}
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_downhill(name):
    path = Path(importlib.import_module(name).__file__)
    part = name.split(".")[1]
    assert part in LEVEL, f"{name}: give {part} a layer in LAYERS"
    for other in imported(path):
        assert LEVEL[other] <= LEVEL[part], f"{name} imports qjax.{other}, which lies above it"


ROOMS = ["grid", "optim", "losses", "adapters", "run", "decoder", "tuning"]  # of qjax.training, downhill


def test_rooms_of_training_run_downhill():
    folder = ROOT / "qjax" / "training"
    assert sorted(p.name for p in folder.iterdir() if (p / "__init__.py").is_file()) == sorted(ROOMS)
    assert [p.name for p in folder.glob("*.py")] == ["__init__.py"]
    for level, room in enumerate(ROOMS):
        files = [p for p in (folder / room).glob("*.py") if p.name != "__init__.py"]
        assert len(files) <= 8, f"{room}: a room of {len(files)} files wants another room"
        for path in files:
            for other in re.findall(r"^\s*(?:from|import) qjax\.training\.(\w+)", path.read_text(), re.M):
                assert ROOMS.index(other) <= level, f"{room}/{path.name} imports {other}, which lies above it"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as readers, and optax, have it
        assert doctest.testmod(importlib.import_module(name)).failed == 0


DEAR = ("README", "lift", "reparam", "rounding", "thinking", "training")  # pages that compile for seconds
DOCS = [
    pytest.param(p, id=str(p.relative_to(ROOT)), marks=[pytest.mark.slow] if p.stem in DEAR else [])
    for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
]


@pytest.mark.parametrize("path", DOCS)
def test_docs_examples(path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert doctest.testfile(str(path), module_relative=False).failed == 0


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=str)
def test_docs_link_to_files_that_exist(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "qjax").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_and_stays_small(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module docstring is missing"
    assert text.count("\n") <= 400, "one idea a file: this one wants splitting"


def globals_read(code):
    """The global names that the functions of a code object read."""
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return names.union(*(globals_read(c) for c in code.co_consts if hasattr(c, "co_code")))


def test_every_global_name_is_there():
    """What a linter tells elsewhere; here the names of axes in shape types stand in its way."""
    for name in MODULES:
        module = importlib.import_module(name)
        source = Path(module.__file__).read_text()
        nodes = list(ast.walk(ast.parse(source)))
        made = {n.name for n in nodes if hasattr(n, "name")}
        made |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        read = globals_read(compile(source, module.__file__, "exec", dont_inherit=True))
        assert not read - made - set(vars(module)) - set(vars(builtins)), name


@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(importlib.import_module(name), "__path__")])
def test_every_package_is_reached_by_its_path(name):
    """No function of the same name shadows it: `import qjax.formats as f` binds the attribute of the parent."""
    scope = {}
    exec(f"import {name} as found", scope)
    assert scope["found"] is sys.modules[name]


def test_the_top_level_has_what_a_notebook_needs():
    assert {"Plan", "Rule", "generate", "perplexity", "divergence", "describe", "__version__"} <= set(qjax.__all__)
    assert all(hasattr(qjax, name) for name in qjax.__all__) and sorted(qjax.__all__) == qjax.__all__
    assert qjax.__version__[0].isdigit()
