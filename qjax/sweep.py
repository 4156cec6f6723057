"""Many runs from one config: its `[sweep]` table says which values its keys take.

    [sweep.grid]                          # every combination
    arm.optimizer.rate = [1e-3, 2e-3]
    arm.grid.format = ["Q4_0", "int2_g64_mid_mse"]
    [sweep.zip]                           # side by side: the first of each, the second of each ...
    seed = [1, 2]
    arm.name = ["one", "two"]
    [[sweep.list]]                        # one after the other, each with keys of its own
    steps = 100

Where a file has several of these, every entry of one meets every entry of the others: 4 x 2 x 1 runs here. A run is
known by a hash of its resolved config, whatever file it came from: values that are added leave finished runs finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from qjax import config as configs
from qjax.errors import UserError

PARTS = ("grid", "zip", "list")
SWEEP = "sweep.json"  # in the folder of its runs: which there are


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Attributes:
      name: the first ten digits of its config's hash.
      values: what the sweep sets, {"arm.optimizer.rate": 1e-3}.
      config: the experiment's dataclass.
      text: the same as TOML, without a script.
    """

    name: str
    values: dict[str, Any]
    config: Any
    text: str


def expand(source: configs.Source) -> tuple[dict[str, Any], ...]:
    """The values that each run of a sweep sets, by dotted keys.

    Raises:
      UserError: no [sweep] table or an unknown part of it, an empty one, lists of two lengths side by side, one key in
        two parts; it names file:key.
    """
    file, table = source.files[-1], source.sweep
    if not table:
        raise UserError(f"{file}: has no [sweep] table; one run is `qjax run {file}`")
    for part in table:
        if part not in PARTS:
            raise UserError(f"{file}:sweep.{part}: a sweep has {', '.join(PARTS)}; keys stand in one of these")
    axes: list[list[dict[str, Any]]] = []
    for key, values in _lists(table.get("grid", {}), f"{file}:sweep.grid"):
        axes.append([{key: value} for value in values])
    beside = dict(_lists(table.get("zip", {}), f"{file}:sweep.zip"))
    if len({len(values) for values in beside.values()}) > 1:
        counts = ", ".join(f"{key} {len(values)}" for key, values in beside.items())
        raise UserError(f"{file}:sweep.zip: lists side by side must be of one length, and these are not: {counts}")
    if beside:
        axes.append([dict(zip(beside, row, strict=True)) for row in zip(*beside.values(), strict=True)])
    if "list" in table:
        entries = table["list"]
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) and e for e in entries):
            raise UserError(f"{file}:sweep.list: must be tables of keys, [[sweep.list]], got {entries!r}")
        axes.append([dict(_dotted(entry)) for entry in entries])
    keys = [key for axis in axes for key in dict.fromkeys(k for entry in axis for k in entry)]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise UserError(f"{file}:sweep: {twice} stands in two parts; say it in one")
    if not axes:
        raise UserError(f"{file}:sweep: has no values; give a key of grid a list of them")
    return tuple({k: v for entry in row for k, v in entry.items()} for row in itertools.product(*axes))


def planned(source: configs.Source, schema: type, smoke: bool = False) -> tuple[Planned, ...]:
    """Every run of a sweep, its config checked; runs that come to the same config are one.

    Raises:
      UserError: what `expand` and `qjax.config.build` raise, with the values that led there.
    """
    runs: dict[str, Planned] = {}
    for values in expand(source):
        table = configs.json_copy(source.values)
        small = configs.json_copy(source.smoke)
        origin = dict(source.origin)
        for key, value in values.items():
            path = tuple(key.split("."))
            _put(table, path, configs.json_copy(value))
            _drop(small, path)  # what a sweep sets is not made small again
            origin |= {path[:n]: source.files[-1] for n in range(1, len(path) + 1)}
        changed = dataclasses.replace(source, values=table, smoke=small, origin=origin)
        try:
            config: Any = configs.build(schema, changed, smoke=smoke and bool(small or not source.smoke))
        except UserError as error:
            raise UserError(f"sweep over {shown(values)}: {error}") from None
        text = configs.to_toml(config)
        name = hashlib.sha256(text.encode()).hexdigest()[:10]
        runs.setdefault(name, Planned(name, values, config, text))
    return tuple(runs.values())


def shown(values: Mapping[str, Any]) -> str:
    """Keys and values for people: `arm.optimizer.rate=0.001 seed=1`."""
    return " ".join(f"{key}={text_of(value)}" for key, value in values.items())


def text_of(value: Any) -> str:
    """A swept value for people: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _lists(table: Any, where: str) -> Iterator[tuple[str, list[Any]]]:
    if not isinstance(table, dict):
        raise UserError(f"{where}: must be a table of keys and lists of their values, got {table!r}")
    for key, values in _dotted(table):
        if not isinstance(values, list):
            raise UserError(f"{where}.{key}: must be a list of the values it takes, got {values!r}")
        if not values:
            raise UserError(f"{where}.{key}: an empty list makes no run; give it a value")
        yield key, values


def _dotted(table: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _put(table: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        inner = table.get(key)
        table[key] = inner if isinstance(inner, dict) else {}
        table = table[key]
    table[path[-1]] = value


def _drop(table: dict[str, Any], path: tuple[str, ...]) -> None:
    for key in path[:-1]:
        table = table.get(key, {})
        if not isinstance(table, dict):
            return
    table.pop(path[-1], None)
