"""Result files, read and written; one that breaks the schema is refused by a line with its file, table and key."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qjax.errors import UserError
from qjax.io.atomic import write_text
from qjax.report.schema import SCHEMA, Column, Result, Run, Table


def read(path: str | Path) -> Result:
    """The result of a file.

    Raises:
      UserError: it cannot be read, or breaks the schema.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON: {error}; a result file is an object with schema {SCHEMA}") from None
    if not isinstance(found, dict) or type(found.get("schema")) is not int or found["schema"] != SCHEMA:
        said = found.get("schema") if isinstance(found, dict) else None
        raise UserError(
            f"{path}: schema must be {SCHEMA}, got {said!r}; qjax report RUN -o FILE.json writes such files"
        )
    return _result({k: v for k, v in found.items() if k != "schema"}, str(path))


def write(result: Result, path: str | Path) -> None:
    """Write a result, a row a line.

    Raises:
      UserError: it breaks the schema, or the file cannot be written.
    """
    whole = dataclasses.asdict(result)
    _result(whole, str(path))
    tables = whole.pop("tables")
    head = json.dumps({"schema": SCHEMA, **whole}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, head.removesuffix("\n}") + ',\n "tables": [\n' + ",\n".join(map(_lines, tables)) + "\n ]\n}\n")


def _lines(table: Mapping[str, Any]) -> str:
    def each(key: str) -> str:
        return ",\n".join(f"    {json.dumps(line, ensure_ascii=False, allow_nan=False)}" for line in table[key])

    name = json.dumps(table["name"], ensure_ascii=False)
    return (
        f'  {{\n   "name": {name},\n   "columns": [\n{each("columns")}\n   ],\n   "rows": [\n{each("rows")}\n   ]\n  }}'
    )


def _result(found: dict[str, Any], at: str) -> Result:
    fields = _fields(found, Result, at)
    for key in ("title", "command", "note"):
        _need(isinstance(fields[key], str), f"{at}: {key}", "text", fields[key])
    _need(bool(fields["command"].strip()), f"{at}: command", "the command line that repeats the run", fields["command"])
    run, tables = _run(fields["run"], f"{at}: run"), _list(fields["tables"], f"{at}: tables")
    lacks = [f.name for f in dataclasses.fields(run) if getattr(run, f.name) is None]
    _need(
        bool(fields["note"] or not lacks), f"{at}: note", f"a reason why run has no {', '.join(lacks)}", fields["note"]
    )
    made = tuple(_table(table, f"{at}: tables.{n}") for n, table in enumerate(tables))
    _distinct([table.name for table in made], f"{at}: tables", "name")
    return Result(fields["title"], fields["command"], fields["note"], run, made)


def _run(found: Any, at: str) -> Run:
    fields = _fields(found, Run, at)
    _need(
        fields["commit"] is None or isinstance(fields["commit"], str), f"{at}.commit", "text or null", fields["commit"]
    )
    _need(fields["changed"] is None or isinstance(fields["changed"], bool), f"{at}.changed", "true, false or null",
          fields["changed"])  # fmt: skip
    for key in ("machine", "device", "versions", "seeds"):
        if fields[key] is not None:
            _need(isinstance(fields[key], dict), f"{at}.{key}", "an object or null", fields[key])
            for name, value in fields[key].items():
                _need(_is_cell(value), f"{at}.{key}.{name}", "text or a finite number", value)
    return Run(**fields)


def _table(found: Any, at: str) -> Table:
    fields = _fields(found, Table, at)
    _need(isinstance(fields["name"], str) and bool(fields["name"]), f"{at}.name", "text", fields["name"])
    at = f"{at} ({fields['name']})"
    columns = tuple(_column(c, f"{at}.columns.{n}") for n, c in enumerate(_list(fields["columns"], f"{at}.columns")))
    _distinct([column.key for column in columns], f"{at}.columns", "key")
    numeric = {c.key: c.digits is not None for c in columns} | {c.interval: True for c in columns if c.interval}
    rows = tuple(_list(fields["rows"], f"{at}.rows"))
    for n, row in enumerate(rows):
        _need(isinstance(row, dict), f"{at}.rows.{n}", "an object", row)
        for key, value in row.items():
            where = f"{at}.rows.{n}.{key}"
            _need(key in numeric, where, f"one of the columns {', '.join(numeric)}", key)
            if numeric[key]:
                _need(value is None or _is_number(value), where, "a finite number or null", value)
            else:
                _need(
                    value is None or isinstance(value, str | bool),
                    where,
                    "text or null (its column has no digits)",
                    value,
                )
    for key in numeric:
        _need(any(key in row for row in rows), f"{at}.columns: {key}", "a key of some row", "none")
    return Table(fields["name"], columns, rows)


def _column(found: Any, at: str) -> Column:
    fields = _fields(found, Column, at)
    for key in ("key", "title", "unit"):
        _need(isinstance(fields[key], str), f"{at}.{key}", "text", fields[key])
    digits, interval = fields["digits"], fields["interval"]
    _need(digits is None or (type(digits) is int and 0 <= digits <= 17), f"{at}.digits", "0 to 17 or null", digits)
    _need(interval is None or (isinstance(interval, str) and digits is not None), f"{at}.interval",
          "a key of the rows, beside a number, or null", interval)  # fmt: skip
    return Column(**fields)


def _fields(found: Any, kind: type, at: str) -> dict[str, Any]:
    """The fields of a dataclass, all of them and no other."""
    _need(isinstance(found, dict), at, "an object", found)
    names = [f.name for f in dataclasses.fields(kind)]
    for key in found:
        _need(key in names, f"{at}: {key}", f"one of {', '.join(names)}", key)
    for key in names:
        _need(key in found, f"{at}: {key}", "there", "nothing")
    return found


def _list(found: Any, at: str) -> Iterable[Any]:
    _need(isinstance(found, list | tuple), at, "a list", found)
    return found


def _distinct(names: list[str], at: str, what: str) -> None:
    for name in names:
        _need(names.count(name) == 1, f"{at}: {name}", f"a {what} of its own", "it twice")


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_cell(value: Any) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _need(true: bool, at: str, right: str, got: Any) -> None:
    if not true:
        raise UserError(f"{at} must be {right}, got {str(got)[:60]!r}")
