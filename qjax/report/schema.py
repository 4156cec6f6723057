"""The schema of a result file: what was measured, by which command, where, and tables of numbers with their units.

{"schema": 1, "title": ..., "command": ..., "note": ..., "run": {commit, changed, ...}, "tables": [
  {"name": ..., "columns": [{"key", "title", "unit", "digits", "interval"}, ...], "rows": [{key: cell}, ...]}]}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

SCHEMA = 1

Cell = str | bool | int | float | None


@dataclasses.dataclass(frozen=True)
class Column:
    """What a key of a table's rows means.

    Attributes:
      key: the key.
      title: its head.
      unit: such as "nats", "bits", "s", "%"; "" for none.
      digits: digits after the point; None for text and for yes or no.
      interval: the key, if any, of what is shown behind ±: a standard error where "se" is a word of it (kl_mean_se),
        else half of a 95 % interval. Such a key needs no column of its own.
    """

    key: str
    title: str
    unit: str = ""
    digits: int | None = None
    interval: str | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells by key; a cell that is None or not there was not measured."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """Where the numbers come from; None for what was not recorded.

    Attributes:
      commit: of the source tree.
      changed: whether the tree held changes that were not committed.
      machine: {"platform": ..., "cores": 2}.
      device: {"kind": "cpu", "count": 1}.
      versions: {"jax": "0.10.2"}.
      seeds: by their keys in the config, or by their place in the rows: {"seed.0": 1}.
    """

    commit: str | None = None
    changed: bool | None = None
    machine: Mapping[str, Cell] | None = None
    device: Mapping[str, Cell] | None = None
    versions: Mapping[str, Cell] | None = None
    seeds: Mapping[str, Cell] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """One result file. The note says what a reader must know, and names what of `run` was not recorded."""

    title: str
    command: str
    note: str
    run: Run
    tables: tuple[Table, ...]
