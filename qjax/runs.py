"""Runs that lie on disk: how they ended, what they measured, what two of them differ in.

A run is a directory with a manifest.json (`qjax.rundir`); its numbers are the scalars of its results.json, with dotted
keys.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qjax.errors import UserError

DEEPEST = 4  # directories below the one that is looked through


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
      path: the directory.
      manifest: what `rundir` wrote.
      numbers: the scalars of results.json, {"losses.student": 3.2}; {} while there is none.
      config: the resolved config, {"arm.optimizer.rate": 0.001}.
    """

    path: Path
    manifest: dict[str, Any]
    numbers: dict[str, float]
    config: dict[str, Any]

    @property
    def state(self) -> str:
        """done, failed, interrupted, or unfinished: running, or ended by a kill."""
        status = self.manifest.get("exit_status")
        if status is None:
            return "unfinished"
        return {0: "done", 130: "interrupted", 143: "interrupted", 129: "interrupted"}.get(status, "failed")


def found(paths: Iterable[Path]) -> Iterator[Run]:
    """The runs in directories, by name; a directory that cannot be read is passed over.

    Raises:
      UserError: no such directory.
    """
    for top in paths:
        if not top.is_dir():
            raise UserError(f"{top}: no such directory of runs")
        for folder, inside, files in os.walk(top):
            deep = len(Path(folder).relative_to(top).parts)
            inside[:] = sorted(d for d in inside if deep < DEEPEST)
            if "manifest.json" in files:
                inside[:] = []  # what lies in a run is its own
                run = read(Path(folder))
                if run is not None:
                    yield run


def read(path: Path) -> Run | None:
    """The run of a directory; None where it has no manifest that can be read."""
    manifest = _json(path / "manifest.json")
    if not isinstance(manifest, dict):
        return None
    try:
        config = tomllib.loads((path / "config.toml").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}
    numbers = {k: float(v) for k, v in leaves(_json(path / "results.json")) if type(v) in (int, float)}
    return Run(path, manifest, numbers, dict(leaves(config)))


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) where they differ; None where one has no such key."""
    return [(k, a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars of nested tables by dotted keys; lists are scalars unless they hold tables, whose place is their key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for n, inner in enumerate(value):
            yield from leaves(inner, f"{at}.{n}" if at else str(n))
    elif value is not None:
        yield at, value


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
