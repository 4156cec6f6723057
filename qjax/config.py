"""Experiment configs: TOML files onto frozen dataclasses, strictly.

    extends = "base.toml"                  # relative; tables merge key by key, the nearer file wins
    script = "../experiments/ptq_grid.py"  # relative to the file that says it; has `Config` and `run(config, out)`
    tokens = 32_768                        # every other key is a field of the script's `Config`
    [smoke]                                # what `--smoke` changes to make the run take seconds; it stands in place
    tokens = 512                           # of the base's, and a table of free names in place of the whole table

A key the dataclass lacks, or a value of another type, is a UserError that names file and key. TOML has no null: the
string "none" stands for None where the field allows it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qjax.errors import UserError

T = TypeVar("T")
DEEPEST = 32  # tables and lists inside each other
SEEDS = 1 << 31  # what every generator takes without cutting it off
KeyPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A config file with everything it extends merged in.

    Attributes:
      name: the file's name without suffix.
      values: the merged table, without `extends`, `script`, `smoke` and `sweep`.
      smoke: the nearest `[smoke]` table.
      sweep: the file's own `[sweep]` table, see `qjax.sweep`; a base's is not inherited.
      origin: which file each key came from; smoke keys sit under ("smoke", ...).
      script: the experiment, or None.
      files: every file read, base first.
    """

    name: str
    values: dict[str, Any]
    smoke: dict[str, Any]
    origin: dict[KeyPath, Path]
    script: Path | None
    files: tuple[Path, ...]
    sweep: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(path: str | Path) -> Source:
    """Read a TOML config and what it extends.

    Raises:
      UserError: no such file, bad TOML (file:line), a cycle of `extends`, `smoke` that is no table.
    """
    path = Path(path)
    tables: list[tuple[Path, dict[str, Any]]] = []  # nearest first
    here: Path | None = path
    while here is not None:
        if "\0" in str(here):
            raise UserError(f"{tables[-1][0] if tables else 'the config'}: a path cannot hold a NUL: {str(here)!r}")
        if any(here.resolve() == seen.resolve() for seen, _ in tables):
            chain = " -> ".join(str(p) for p, _ in tables)
            raise UserError(f"{chain} -> {here}: `extends` goes in a circle")
        table = _parse(here, said_by=tables[-1][0] if tables else None)
        tables.append((here, table))
        base = table.pop("extends", None)
        if base is not None and not isinstance(base, str):
            raise UserError(f"{here}:extends must be a string, the path of a TOML file, got {base!r}")
        here = here.parent / base if base is not None else None

    values: dict[str, Any] = {}
    smoke: dict[str, Any] = {}
    sweep: Any = {}
    origin: dict[KeyPath, Path] = {}
    script: Path | None = None
    for file, table in reversed(tables):
        said = table.pop("script", None)
        small = table.pop("smoke", None)
        sweep = table.pop("sweep", {})
        if not isinstance(sweep, dict):
            raise UserError(f"{file}:sweep must be a table, of grid, zip or list, got {sweep!r}")
        if not isinstance(small, dict | None):
            raise UserError(f"{file}:smoke must be a table of the keys `--smoke` changes, got {small!r}")
        if said is not None:
            if not isinstance(said, str) or "\0" in said:
                raise UserError(f"{file}:script must be a string, the path of a Python file, got {said!r}")
            if small is None and script is not None and script.resolve() != (file.parent / said).resolve():
                small = {}  # what made another script's run small are not this one's keys
            script = file.parent / said
            origin["script",] = file
        _merge(values, table, file, origin)
        if small is not None:  # the base's would name what this file replaced
            smoke = {}
            _merge(smoke, small, file, origin, ("smoke",))
    return Source(path.stem, values, smoke, origin, script, tuple(file for file, _ in reversed(tables)), sweep)


def _parse(path: Path, said_by: Path | None) -> dict[str, Any]:
    deep = UserError(f"{path}: tables or lists are nested more than {DEEPEST} deep")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise deep from None
    except tomllib.TOMLDecodeError as error:
        what = re.sub(r" \(at .*\)$", "", str(error))
        line = re.search(r"at line (\d+)", str(error))
        raise UserError(f"{path}:{line[1] if line else 'end'}: not valid TOML: {what}") from None
    except (FileNotFoundError, NotADirectoryError):
        why = f" (`extends` of {said_by})" if said_by is not None else ""
        raise UserError(f"{path}: no such config file{why}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid TOML: byte {error.start} is not UTF-8") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    level: list[Any] = [table]
    for _ in range(DEEPEST):
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
        level = [part for part in level if isinstance(part, dict | list)]
    if level:
        raise deep
    return table


def _merge(into: dict, table: dict, file: Path, origin: dict[KeyPath, Path], at: KeyPath = ()) -> None:
    for key, value in table.items():
        origin[(*at, key)] = file
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, file, origin, (*at, key))
        elif isinstance(value, dict):
            into[key] = {}
            _merge(into[key], value, file, origin, (*at, key))
        else:
            into[key] = value


def build(schema: type[T], source: Source, smoke: bool = False) -> T:
    """The dataclass a config stands for.

    Args:
      schema: a frozen dataclass; its fields' types are checked, nested dataclasses are tables.
      source: what `read` returned.
      smoke: lay the `[smoke]` table over the rest.

    Raises:
      UserError: unknown key (with a suggestion), wrong type, missing key; each names file:key.
    """
    _table(schema, source.smoke, source, ("smoke",), partial=True)  # a typo there must not wait for --smoke
    if not smoke:
        return _table(schema, source.values, source, ())
    if not source.smoke:
        raise UserError(f"{source.files[-1]}: has no [smoke] table, so --smoke has nothing to shrink")
    values = json_copy(source.values)
    _lay_over(schema, values, source.smoke)
    return _table(schema, values, source, ())


def _lay_over(schema: Any, values: dict[str, Any], smoke: dict[str, Any]) -> None:
    hints = typing.get_type_hints(schema)
    for key, value in smoke.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(values.get(key), dict):
            _lay_over(hints[key], values[key], value)
        else:
            values[key] = json_copy(value)


def json_copy(value: Any) -> Any:
    """A deep copy of nested tables and lists."""
    if isinstance(value, dict):
        return {key: json_copy(item) for key, item in value.items()}
    return [json_copy(item) for item in value] if isinstance(value, list) else value


def _where(source: Source, at: KeyPath) -> str:
    file = next((source.origin[at[:n]] for n in range(len(at), 0, -1) if at[:n] in source.origin), None)
    return f"{file or source.files[-1]}:{'.'.join(at)}"


def _table(schema: type[T], table: Mapping[str, Any], source: Source, at: KeyPath, partial: bool = False) -> T:
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(schema)
    made: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the keys here are {', '.join(fields)}"
            raise UserError(f"{_where(source, (*at, key))}: unknown key{hint}")
        made[key] = _value(hints[key], value, source, (*at, key), partial)
    if partial:
        return made  # type: ignore[return-value]
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise UserError(f"{source.files[-1]}: the key {'.'.join((*at, name))} is missing")
    try:
        return schema(**made)
    except UserError as error:  # a dataclass's own __post_init__ check
        raise UserError(f"{_where(source, at)}: {error}" if at else f"{source.files[-1]}: {error}") from None


def _value(hint: Any, value: Any, source: Source, at: KeyPath, partial: bool = False) -> Any:
    """`value` as `hint`, or a UserError that names file:key."""
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value == "none" and type(None) in args:
            return None
        for option in args:
            try:
                return _value(option, value, source, at, partial)
            except UserError as error:
                if len([a for a in args if a is not type(None)]) == 1 and option is not type(None):
                    raise error
        raise _mismatch(hint, value, source, at)
    if kind is typing.Literal:
        if value not in args or type(value) is not type(args[args.index(value)]):
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hint_text = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{_where(source, at)}: must be one of {', '.join(map(repr, args))}, got {value!r}{hint_text}"
            )
        return value
    if kind is tuple and isinstance(value, list):
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_value(args[0], item, source, at) for item in value)
        if len(args) == len(value):
            return tuple(_value(a, item, source, at) for a, item in zip(args, value, strict=True))
    elif kind is dict and isinstance(value, dict):
        return {key: _value(args[1], item, source, (*at, key)) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _table(hint, value, source, at, partial)  # type: ignore[arg-type]
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (hint in (bool, int, str) and type(value) is hint):
        if hint is int and not -(1 << 63) <= value < 1 << 63:
            raise UserError(f"{_where(source, at)}: {value} does not fit 64 bits")
        return value
    raise _mismatch(hint, value, source, at)


def _mismatch(hint: Any, value: Any, source: Source, at: KeyPath) -> UserError:
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    if dataclasses.is_dataclass(hint):
        expected = "a table"
    elif typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        expected = f"a list of {getattr(inner, '__name__', inner)}"
    else:
        expected = names.get(hint, str(hint))
    return UserError(f"{_where(source, at)}: must be {expected}, got {json.dumps(value, default=str)}")


def check_seed(name: str, value: int) -> int:
    """A seed itself, or a UserError where a generator would cut it off.

    >>> check_seed("--seed", 7)
    7
    """
    if not 0 <= value < SEEDS:
        raise UserError(f"{name}: a seed lies in 0 .. {SEEDS - 1}, got {value}")
    return value


def to_toml(config: Any, head: Mapping[str, Any] | None = None) -> str:
    """A dataclass as TOML text, complete: reading it back gives an equal dataclass.

    Args:
      config: a dataclass whose values are scalars, strings, paths, tuples, dicts and dataclasses.
      head: keys to write first (`script`).
    """
    lines = [f"{_key(key)} = {_toml(value)}" for key, value in (head or {}).items()]
    _write_table(_as_dict(config), (), lines)
    return "\n".join(lines) + "\n"


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _as_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return {str(k): _as_dict(v) for k, v in value.items()} if isinstance(value, dict) else value


def _write_table(table: Mapping[str, Any], at: KeyPath, lines: list[str]) -> None:
    lines += [f"{_key(k)} = {_toml(v)}" for k, v in table.items() if not isinstance(v, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{'.'.join(map(_key, (*at, key)))}]"]
            _write_table(value, (*at, key), lines)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quote(key)


def _quote(text: str) -> str:
    """JSON's escapes are TOML's, but for DEL, which TOML wants escaped too."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"{text!r} is not UTF-8 text, which a config must be; give the file or text another name")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    if isinstance(value, dict) or dataclasses.is_dataclass(value):  # inside a list: an inline table
        items = _as_dict(value).items()
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in items) + "}"
    return _quote(str(value))
