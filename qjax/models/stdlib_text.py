"""Text every machine has: the source files of the running Python's standard library.

The reference model is trained on `train_text()` and judged on `heldout_text()`; `calibration_text()` is a part of the
training text. Which modules are held out is fixed below, so that the split means the same on every Python.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Never trained on; evaluation text is these files in this order. All are in every CPython from 3.11 to 3.14.
HELDOUT = (
    "argparse.py", "ast.py", "bisect.py", "calendar.py", "collections/__init__.py", "configparser.py", "copy.py",
    "csv.py", "dataclasses.py", "difflib.py", "email/message.py", "fractions.py", "heapq.py", "http/client.py",
    "json/decoder.py", "logging/handlers.py", "queue.py", "random.py", "shutil.py", "statistics.py",
    "textwrap.py", "unittest/mock.py", "urllib/parse.py", "zipfile.py", "zipfile/__init__.py",
)  # fmt: skip

_SKIP = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "ensurepip",
    "config-",
)


def stdlib_root() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def training_files(root: Path | None = None) -> list[Path]:
    """Every module of the standard library but the held-out ones and the test suites, sorted by path."""
    root = root or stdlib_root()
    held = {root / name for name in HELDOUT}
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if path not in held
        and not any(part.startswith(_SKIP) for part in path.relative_to(root).parts[:-1])
        and not path.name.startswith(("_sysconfigdata", "test_"))
    ]


def _read(paths: list[Path]) -> list[str]:
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
    return [text for text in texts if text.strip()]


def train_text() -> list[str]:
    """One string a module."""
    return _read(training_files())


def heldout_text() -> str:
    """The evaluation text: the held-out modules of this Python, one after the other (about 0.9 MB)."""
    root = stdlib_root()
    return "\n\n".join(_read([root / name for name in HELDOUT if (root / name).is_file()]))


def calibration_text(characters: int = 400_000, seed: int = 0) -> str:
    """A reproducible draw of training modules, disjoint from the evaluation text."""

    def draw(path: Path) -> str:
        return hashlib.sha256(f"{seed}:{path.relative_to(stdlib_root())}".encode()).hexdigest()

    taken: list[str] = []
    total = 0
    for path in sorted(training_files(), key=draw):
        for text in _read([path]):
            taken.append(text[:40_000])  # no single module dominates
            total += len(taken[-1])
        if total >= characters:
            break
    return "\n\n".join(taken)[:characters]
