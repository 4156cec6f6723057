"""A stage behind the rounding of a block: what is continuous of it is tuned before anything is written.

    tuner(name, block, packed, z, y, used) -> packed'        |block(z; packed') - y| is small; same codes, same bytes

z is the block's input behind all that is rounded, y the float block's output on the float input. A tuner that works
within blocks is called behind each of its inputs too, and moves what is still to be rounded with it. A block is one
piece of work then: after a kill it is taken from the file whole, or rounded and tuned again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.models.model import dense_params
from qjax.models.stages import Apply
from qjax.pipeline.report import CalibrationReport
from qjax.tensor import QTensor

Emit = Callable[[str, Any, QTensor, CalibrationReport | None], None]  # path, float weight, what became of it
NOTHING: Mapping[str, QTensor] = MappingProxyType({})


@runtime_checkable
class Tuner(Protocol):
    """A frozen record whose repr says all that it does: files of another one are not continued."""

    @property
    def within(self) -> bool:
        """Whether it is called behind each of a block's inputs."""

    def __call__(
        self, name: str, apply: Apply, packed: Any, x: np.ndarray, y: np.ndarray, used: int, rest: tuple[str, ...] = ()
    ) -> tuple[Any, str]:
        """Tune a block.

        Args:
          name: of the block.
          apply: (params, x) -> y.
          packed: its params, with QTensors.
          x, y: f32[windows, context, dim].
          used: the first so many windows may train; the others are held out.
          rest: paths in it of floats that are still to be rounded, and may move.

        Returns: the params with QTensors of the same formats, everything else but `rest` as it was; and a line for the
          report.
        """


@dataclasses.dataclass
class Pending:
    """The weights of a block that are rounded and not yet emitted.

    Attributes:
      weights: path -> (packed, its line).
      said: of tunings within the block.
    """

    weights: dict[str, tuple[QTensor, CalibrationReport | None]] = dataclasses.field(default_factory=dict)
    said: list[str] = dataclasses.field(default_factory=list)

    def settled(
        self, tuner: Tuner, name: str, apply: Apply, x: np.ndarray, y: np.ndarray, used: int, now: Any,
        rest: tuple[str, ...],
    ) -> Any:  # fmt: skip
        """Tune what is rounded of a block so far, and `rest` of it, still floats; returns it dense."""
        if not self.weights:  # taken from an earlier run
            return now
        packed, said = tuner(name, apply, self._packed(name, now), x, y, used, rest)
        self.said.append(said)
        self.weights = {
            path: (get(packed, path.removeprefix(f"{name}/")), line) for path, (_, line) in self.weights.items()
        }
        return dense_params(packed)

    def tuned(
        self, tuner: Tuner, name: str, apply: Apply, floats: Any, x: np.ndarray, y: np.ndarray, used: int, emit: Emit
    ) -> Any:
        """Tune the block, emit its weights, and return it dense."""
        packed, said = tuner(name, apply, self._packed(name, floats), x, y, used)
        for path, (_, line) in self.weights.items():
            at = path.removeprefix(f"{name}/")
            note = "; ".join([*([line.note] if line is not None and line.note else []), *self.said, said])
            line = None if line is None else dataclasses.replace(line, note=note)
            emit(path, get(floats, at), get(packed, at), line)
        self.weights.clear()
        self.said.clear()
        return dense_params(packed)

    def _packed(self, name: str, params: Any) -> Any:
        for path, (q, _) in self.weights.items():
            params = put(params, path.removeprefix(f"{name}/"), q)
        return params


def whole(earlier: Mapping[str, QTensor], paths: Iterable[str]) -> Mapping[str, QTensor]:
    """What an earlier run has emitted of a block: all of it, or nothing."""
    return earlier if all(path in earlier for path in paths) else NOTHING


def get(tree: Any, path: str) -> Any:
    """A leaf by its path."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def put(tree: Any, path: str, leaf: Any) -> Any:
    """The tree with one leaf replaced."""
    key, _, rest = path.partition("/")
    return {**tree, key: put(tree[key], rest, leaf) if rest else leaf}
