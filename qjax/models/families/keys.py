"""The keys of a config.json or of GGUF metadata, read one by one and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Keys:
    """What a file says.

    Attributes:
      values: key -> value.
      absent: key -> what it means where the file lacks it; a string: the value of that key.
      at: what stands in front of every key in the file ("llama.").
      where: what stands in front of a key in an error ("config.json: ").
      stored: "float32" where the file's floats are; the shortest decimal that rounds to one is what was meant.
    """

    values: Mapping[str, Any]
    absent: Mapping[str, Any]
    at: str = ""
    where: str = "config.json: "
    stored: str = "float64"

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it stands; `default` where neither the file nor `absent` has one, or the file says null."""
        if self.at + key in self.values:
            value = self.values[self.at + key]
        else:
            value = self.absent.get(key)
            value = self.get(value) if isinstance(value, str) else value
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if self.stored == "float32":
            value = same_in_all_layers(self.where + key, value)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value <= 0:
            what = "is missing" if value is None else f"= {value!r}"
            raise UserError(f"{self.where}{key} {what}; expected a positive integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        return self.positive(key, self.get(key, default))

    def optional(self, key: str, default: float | None = None) -> float | None:
        """A positive number, or None where there is none."""
        value = self.get(key, default)
        return None if value is None else self.positive(key, value)

    def positive(self, key: str, value: Any) -> float:
        """The value as a float, or a UserError that names the key."""
        if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not value > 0:
            what = "is missing" if value is None else f"= {value!r}"
            raise UserError(f"{self.where}{key} {what}; expected a positive number")
        return shortest(value) if self.stored == "float32" else float(value)


def same_in_all_layers(key: str, value: Any) -> Any:
    """The common value of a per-layer array; a plain value passes through."""
    if isinstance(value, list | tuple | np.ndarray):
        if len(value) == 0 or any(v != value[0] for v in value):
            raise UserError(f"{key} differs between layers, which is not supported")
        return value[0]
    return value


def shortest(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
