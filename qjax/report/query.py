"""A number, a table or a cross table of result files, asked for in one line: documents say it where they want a number.

    recipes/rows kl_mean name=gptq:Q3_K_M                         a cell, with what stands behind its ±
    bench/median seconds name=qjax over name=torch :digits=2      two cells, divided (`minus`: subtracted)
    share/rows difference share=0.1|0.2 :of=max :times=-1         of several rows: min, max, mean, count
    table recipes/rows name=format kl_mean=KL:4 where bits!=32 :sort=-bits  columns of rows (=title:digits)
    pivot against/summary kl_mean mix recipe                      a column's cells by two others: rows, columns
    points methods_3bit/rows layer_bits kl where method=rtn       of a figure: x, y and y's ±

Words are split as a shell does. FILE/TABLE is a result file without its suffix and a table of it.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence

from qjax.errors import UserError, check_word
from qjax.report.schema import Cell, Column, Result, Table
from qjax.report.tables import cell, number

Row = Mapping[str, Cell]
OPTIONS = ("digits", "times", "of", "bare", "sort")
BLOCKS = ("table", "pivot", "points")
OF: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min, "max": max, "mean": lambda found: sum(found) / len(found), "count": lambda found: float(len(found)),
}  # fmt: skip


def is_table(query: str) -> bool:
    """Whether the answer is a table, not a number or a word."""
    return kind_of(query) in BLOCKS


def kind_of(query: str) -> str:
    """A query's first word: which of BLOCKS it asks for, where it is one of them."""
    return query.split(maxsplit=1)[0] if query.strip() else ""


def answer(query: str, results: Mapping[str, Result]) -> str:
    """The cell, or what was made of several, as text.

    Args:
      query: see the head of this file.
      results: by their files' names without suffix.

    Raises:
      UserError: an unknown file, table, column or option, or another number of rows than one.
    """
    words, options = _words(query)
    if len(words) < 2:
        raise UserError("a query is FILE/TABLE COLUMN KEY=VALUE...")
    table, (key, *rest) = _table(words[0], results), words[1:]
    column = _column(table, key)
    kind = next((word for word in rest if word in ("over", "minus")), "")
    parts = [rest[: rest.index(kind)], rest[rest.index(kind) + 1 :]] if kind else [rest]
    found = [_rows(table, part) for part in parts]
    if not kind and "of" not in options:
        return _cell(_one(found[0]), column, options)
    check_word(":of", options.get("of", "mean"), list(OF))
    of = OF[options["of"]] if "of" in options else None
    values = [_value([row[key] for row in rows if row.get(key) is not None], of) for rows in found]
    made = values[0] if not kind else values[0] / values[1] if kind == "over" else values[0] - values[1]
    digits = _integer(options, "digits", 0 if options.get("of") == "count" else 2 if kind == "over" else column.digits)
    return number(made * _times(options), digits or 0)


def view(query: str, results: Mapping[str, Result]) -> Table:
    """The table that a query of `table`, `pivot` or `points` asks for.

    Raises:
      UserError: as `answer`, a cross table with two rows for a cell, or points that are not of two columns of numbers.
    """
    (kind, *words), options = _words(query)
    where = words[words.index("where") + 1 :] if "where" in words else []
    words = words[: words.index("where")] if "where" in words else words
    if len(words) < 2:
        raise UserError(f"a query is {kind} FILE/TABLE COLUMN...")
    table = _table(words[0], results)
    rows = _rows(table, where)
    if key := options.get("sort", ""):
        _column(table, key.removeprefix("-"))
        rows = sorted(rows, key=lambda row: _order(row.get(key.removeprefix("-"))), reverse=key.startswith("-"))
    if not rows:
        raise UserError(f"{words[0]}: no row has {' '.join(where)}")
    if kind == "pivot":
        return _pivot(table, rows, words[1:], options)
    shown = tuple(_titled(table, word, options) for word in words[1:])
    if kind == "points":
        _need_two_numbers(shown, rows)
    return Table(table.name, shown, tuple(rows))


def _pivot(table: Table, rows: Sequence[Row], words: Sequence[str], options: Mapping[str, str]) -> Table:
    if len(words) != 3:
        raise UserError("a cross table wants three columns: its cells, its rows, its columns")
    value, side, top = (_titled(table, word, options) for word in words)
    names = list(dict.fromkeys(_text(row.get(top.key)) for row in rows))
    made: dict[str, dict[str, Cell]] = {}
    for row in rows:
        line = made.setdefault(_text(row.get(side.key)), {side.key: _text(row.get(side.key))})
        name = _text(row.get(top.key))
        if name in line:
            raise UserError(f"two rows have {side.key}={line[side.key]} and {top.key}={name}; say more behind where")
        line[name] = cell(row, value)
    heads = (Column(name, name) for name in names)
    return Table(table.name, (dataclasses.replace(side, digits=None, interval=None), *heads), tuple(made.values()))


def _need_two_numbers(shown: Sequence[Column], rows: Sequence[Row]) -> None:
    if len(shown) != 2:
        raise UserError("points want two columns: x and y")
    for column in shown:
        if column.digits is None or not all(isinstance(row.get(column.key), int | float) for row in rows):
            raise UserError(f"points want numbers, and a cell of {column.key} is none; say more behind where")


def _words(query: str) -> tuple[list[str], dict[str, str]]:
    try:
        words = shlex.split(query)
    except ValueError as error:
        raise UserError(f"{error}; close it") from None
    options = dict((word[1:] + "=").split("=", 1) for word in words if word.startswith(":"))
    for name in options:
        check_word("option", name, OPTIONS)
    return [w for w in words if not w.startswith(":")], {k: v.removesuffix("=") for k, v in options.items()}


def _table(at: str, results: Mapping[str, Result]) -> Table:
    file, _, name = at.partition("/")
    check_word("result file", file, list(results))
    tables = {table.name: table for table in results[file].tables}
    check_word(f"table of {file}", name, list(tables))
    return tables[name]


def _column(table: Table, key: str) -> Column:
    columns = {column.key: column for column in table.columns}
    check_word(f"column of {table.name}", key, list(columns))
    return columns[key]


def _titled(table: Table, word: str, options: Mapping[str, str]) -> Column:
    key, _, said = word.partition("=")
    title, _, own = said.partition(":")
    column = _column(table, key)
    wanted = {**options, "digits": own} if own else options
    digits = None if column.digits is None else _integer(wanted, "digits", column.digits)
    interval = None if "bare" in options else column.interval
    return dataclasses.replace(column, title=title or column.title, digits=digits, interval=interval)


def _rows(table: Table, conditions: Iterable[str]) -> list[Row]:
    rows = list(table.rows)
    for word in conditions:
        key, _, wanted = word.partition("=")
        away = key.endswith("!")
        _column(table, key.removesuffix("!"))
        if "=" not in word:
            raise UserError(f"{word!r} is no condition; say KEY=VALUE, KEY=ONE|OTHER or KEY!=VALUE")
        rows = [r for r in rows if any(_same(r.get(key.removesuffix("!")), w) for w in wanted.split("|")) != away]
    return rows


def _same(value: Cell, wanted: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return value == float(wanted)
        except ValueError:
            return False
    return _text(value) == wanted


def _text(value: Cell) -> str:
    return "" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _order(value: Cell) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, _text(value)  # type: ignore[arg-type]


def _one(rows: Sequence[Row]) -> Row:
    if len(rows) != 1:
        raise UserError(f"{len(rows)} rows are meant where one must be; say more of it, or :of=max")
    return rows[0]


def _value(found: Sequence[Cell], of: Callable[[Sequence[float]], float] | None) -> float:
    numbers = [float(v) for v in found if isinstance(v, int | float)]
    if not numbers or (of is None and len(numbers) != 1):
        raise UserError(f"{len(numbers)} numbers are meant where one must be; say more of it, or :of=max")
    return of(numbers) if of else numbers[0]


def _cell(row: Row, column: Column, options: Mapping[str, str]) -> str:
    if column.digits is None:
        return cell(row, column)
    keys = [column.key, *([column.interval] if column.interval and "bare" not in options else [])]
    factor, digits = _times(options), _integer(options, "digits", column.digits)
    made: dict[str, Cell] = {}
    for key, sign in zip(keys, (factor, abs(factor)), strict=False):
        value = row.get(key)
        made[key] = value * sign if isinstance(value, int | float) and factor != 1 else value
    return cell(made, dataclasses.replace(column, digits=digits, interval=keys[1] if len(keys) > 1 else None))


def _times(options: Mapping[str, str]) -> float:
    try:
        return float(options.get("times", "1"))
    except ValueError:
        raise UserError(f":times={options['times']} must be a number") from None


def _integer(options: Mapping[str, str], name: str, default: int | None) -> int | None:
    if name not in options:
        return default
    if not options[name].isdigit():
        raise UserError(f":{name}={options[name]} must be a whole number")
    return int(options[name])
