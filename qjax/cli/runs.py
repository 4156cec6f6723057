"""`qjax runs`: what lies in run directories, and what two runs differ in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from qjax.cli import output
from qjax.cli.targets import check_json
from qjax.errors import UserError
from qjax.runs import Run, differences, found, read

TENSORBOARD_HELP = "write the runs for TensorBoard into a new folder: logs as scalars, configs and results as hparams"
SHOW_HELP = "numbers to show, by their dotted keys in results.json (losses.student); none: the first three"


@dataclasses.dataclass(frozen=True)
class Runs:
    """List runs: when, how long, how they ended, what they measured; or compare two of them.

    qjax runs                                        # those in runs/
    qjax runs runs/sweeps/rates --show losses.student
    qjax runs --diff runs/a runs/b                   # keys, versions and numbers in which they differ
    qjax runs runs/sweeps/rates --tensorboard OUT    # tensorboard --logdir OUT
    """

    paths: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    diff: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A B", help="two run directories to compare")] = (
        None
    )
    show: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY", help=SHOW_HELP)] = ()
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help=output.JSON_HELP)] = None
    tensorboard: Annotated[Path | None, tyro.conf.arg(metavar="OUT", help=TENSORBOARD_HELP)] = None

    def execute(self) -> None:
        check_json(self.json)
        if self.diff is not None:
            self._compare(*self.diff)
            return
        runs = list(found(self.paths))
        if not runs:
            raise UserError(
                f"{', '.join(map(str, self.paths))}: no run there yet; make one with qjax run or qjax sweep"
            )
        if self.tensorboard is not None:
            from qjax.report.tensorboard import export

            export(named(runs), self.tensorboard)
            print(f"{self.tensorboard}: {len(runs)} runs; see them with: tensorboard --logdir {self.tensorboard}")
            return
        rows = [_facts(run) for run in runs]
        if output.write_json(self.json, {"runs": rows}):
            return
        shown = self.show or keys_of(runs)
        output.table(
            ("run", "started", "seconds", "state", "commit", *shown),
            [
                (
                    r["path"],
                    r["start"],
                    _number(r["seconds"]),
                    r["state"],
                    r["commit"],
                    *map(_number, _picked(r, shown)),
                )
                for r in rows
            ],
            numbers=(2, *range(5, 5 + len(shown))),
        )

    def _compare(self, *paths: Path) -> None:
        a, b = (_read(path) for path in paths)
        numbers = [(k, x, y, None if None in (x, y) else y - x) for k, x, y in differences(a.numbers, b.numbers)]
        facts = (
            ("config", differences(a.config, b.config)),
            ("made by", differences(_made_by(a), _made_by(b))),
        )
        said = {
            "paths": [str(p) for p in paths],
            **{name: [{"key": k, "values": [x, y]} for k, x, y in rows] for name, rows in facts},
            "numbers": [{"key": k, "values": [x, y], "difference": d} for k, x, y, d in numbers],
        }
        if output.write_json(self.json, said):
            return
        for name, rows in facts:
            if rows:
                output.table((name, *map(str, paths)), [(k, _text(x), _text(y)) for k, x, y in rows])
        if numbers:
            output.table(
                ("number", *map(str, paths), "difference"),
                [(k, _number(x), _number(y), _number(d)) for k, x, y, d in numbers],
                numbers=(1, 2, 3),
            )
        if not numbers and not any(rows for _, rows in facts):
            print("no difference in config, versions or numbers")


def keys_of(runs: Sequence[Run], most: int = 3) -> tuple[str, ...]:
    """The first few numbers that runs have and were not told, those of nested lists last."""
    keys = dict.fromkeys(k for run in runs for k in run.numbers if k not in run.config)
    return tuple(sorted(keys, key=lambda k: (k.count("."), any(part.isdigit() for part in k.split(".")))))[:most]


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by their directories, as short as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    top = Path(os.path.commonpath([path.parent for path in paths]))
    return {str(path.relative_to(top)): run for path, run in zip(paths, runs, strict=True)}


def _read(path: Path) -> Run:
    run = read(path)
    if run is None:
        raise UserError(f"{path}: no run directory; it has no manifest.json that can be read")
    return run


def _facts(run: Run) -> dict[str, Any]:
    git = run.manifest.get("git") or {}
    commit = str(git.get("commit") or "")[:10] + ("+" if git.get("changed") else "")
    return {
        "path": str(run.path), "start": run.manifest.get("start"), "seconds": run.manifest.get("wall_seconds"),
        "state": run.state, "commit": commit, "numbers": run.numbers,
    }  # fmt: skip


def _made_by(run: Run) -> dict[str, Any]:
    git, device = (run.manifest.get(k) or {} for k in ("git", "device"))
    versions = run.manifest.get("versions") or {}
    return {**versions, "commit": git.get("commit"), "changed": git.get("changed"), "device": device.get("kind")}


def _picked(row: dict[str, Any], keys: Sequence[str]) -> list[Any]:
    return [row["numbers"].get(key) for key in keys]


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, int | float) else str(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
