"""From a run to a result file: what an experiment returned as tables, its keys as columns with units."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.errors import UserError
from qjax.report.columns import columns
from qjax.report.schema import Result, Run, Table

WHERE = {"device", "cores", "architecture", "machine", "platform", "load", "peak_rss_mb"}  # not versions


def from_run(folder: Path) -> Result:
    """The result of a run directory, of its manifest.json and results.json, under the directory's name.

    Raises:
      UserError: one of the two is missing or damaged.
    """
    manifest, found = _load(folder / "manifest.json"), _load(folder / "results.json")
    if not isinstance(manifest, dict) or not isinstance(manifest.get("command"), list) or not manifest["command"]:
        raise UserError(f"{folder / 'manifest.json'}: command is missing; qjax run writes it")
    command = shlex.join(map(str, manifest["command"]))
    return build(found, title=folder.resolve().name, command=command, manifest=manifest)


def build(found: Any, *, title: str, command: str, note: str = "", manifest: Mapping[str, Any] | None = None) -> Result:
    """A result of plain JSON: lists of objects become tables, single values one table of one row.

    Args:
      found: what an experiment returned; "machine", "versions" and "cores" in it say where it ran.
      title, command, note: as `Result` has them.
      manifest: what `qjax.rundir` wrote of the run.
    """
    found = dict(found) if isinstance(found, dict) else {"rows": found}
    facts = {"versions": found.pop("versions", None), "cores": found.pop("cores", None), **(manifest or {})}
    machine = found.pop("machine") if isinstance(found.get("machine"), dict) else {}
    rows = [row for value in found.values() if isinstance(value, list) for row in value if isinstance(row, dict)]
    run = _run(facts, machine, [row["seed"] for row in rows if "seed" in row])
    lacks = [name for name in Run.__dataclass_fields__ if getattr(run, name) is None]
    notes = [note.rstrip(".")] * bool(note) + [f"not recorded: {', '.join(lacks)}"] * bool(lacks)
    return Result(title, command, "; ".join(notes), run, tuple(_tables(found)))


def _run(facts: Mapping[str, Any], machine: Mapping[str, Any], rows_seeds: Sequence[Any]) -> Run:
    git = facts.get("git") or {}
    device = facts.get("device") or ({"kind": machine["device"]} if "device" in machine else None)
    versions = {**{k: v for k, v in machine.items() if k not in WHERE}, **(facts.get("versions") or {})}
    where = {"platform": facts.get("platform"), "architecture": machine.get("machine") or versions.pop("machine", None),
             "cores": facts.get("cores") or facts.get("cpu_count")}  # fmt: skip
    where |= {k: v for k, v in machine.items() if k in WHERE - {"device", "machine"}}
    seeds = facts.get("seeds") or {
        f"seed.{n}": s for n, s in enumerate(sorted({s for s in rows_seeds if type(s) is int}))
    }
    return Run(
        git.get("commit"),
        git.get("changed"),
        {k: v for k, v in where.items() if v is not None} or None,
        device,
        versions or None,
        seeds or None,
    )


def _tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Tables of lists and objects under their names; the scalars beside them are one of their own, "values"."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _of_object(name, value)
        elif isinstance(value, list) and value:
            yield from _table(
                name, [v if isinstance(v, dict) else {"round": n, name: v} for n, v in enumerate(value, 1)]
            )
    scalars = {key: value for key, value in found.items() if _scalar(value)}
    if scalars:
        yield from _table("values", [scalars])


def _of_object(name: str, value: Mapping[str, Any]) -> Iterator[Table]:
    """An object of objects has a row for each, one of lists a row for each of theirs, one of scalars a single row."""
    if value and all(isinstance(v, dict) for v in value.values()):
        yield from _table(name, [{"name": key, **v} for key, v in value.items()])
    elif value and all(isinstance(v, list) and all(isinstance(r, dict) for r in v) for v in value.values()):
        yield from _table(name, [{"name": k, "round": n, **r} for k, v in value.items() for n, r in enumerate(v, 1)])
    elif value:
        yield from _table(name, [value])


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """A table of the rows, and one of each longer list in them, whose rows name the row they belong to."""
    flat = [dict(_flat(row)) for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    names = [str(row.get("name", n)) for n, row in enumerate(flat, 1)]
    if len(set(names)) < len(names):
        names = [str(n) for n in range(1, len(flat) + 1)]
    lists = [key for key in keys if any(isinstance(row.get(key), list) for row in flat)]
    cells = [{k: v for k, v in row.items() if k not in lists} for row in flat]
    plain = [key for key in keys if key not in lists]
    for key in plain:  # a column is text or numbers
        if any(isinstance(row.get(key), str | bool) for row in cells):
            for row in cells:
                if isinstance(row.get(key), int | float) and not isinstance(row[key], bool):
                    row[key] = str(row[key])
    yield Table(name, columns(plain, cells, name), tuple(cells))
    for key in lists:
        inner = [
            {"of": of, "round": n, **(item if isinstance(item, dict) else {key: item})}
            for of, row in zip(names, flat, strict=True)
            for n, item in enumerate(row.get(key) or [], 1)
        ]
        if inner:
            yield from _table(f"{name}.{key}", inner)


def _flat(row: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Cells by dotted keys; two numbers side by side, a shape or a range, are two columns."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{key}.")
        elif isinstance(value, list) and len(value) == 2 and all(map(_scalar, value)):
            yield from ((f"{at}{key}.{n}", v) for n, v in enumerate(value))
        else:
            yield f"{at}{key}", value


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | int | float)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run directory has it once its run is done") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
