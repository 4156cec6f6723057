"""A stage behind the rounding of a block: what is continuous of it is tuned before anything is written.

    tuner(name, block, packed, z, y, used) -> packed'        |block(z; packed') - y| is small; same codes, same bytes

z is the block's input behind all that is rounded, y the float block's output on the float input. A block is one piece
of work then: after a kill it is taken from the file whole, or rounded and tuned again.
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

    def __call__(
        self, name: str, apply: Apply, packed: Any, x: np.ndarray, y: np.ndarray, used: int
    ) -> tuple[Any, str]:
        """Tune a block.

        Args:
          name: of the block.
          apply: (params, x) -> y.
          packed: its params, with QTensors.
          x, y: f32[windows, context, dim].
          used: the first so many windows may train; the others are held out.

        Returns: the params with QTensors of the same formats, everything else as it was; and a line for the report.
        """


@dataclasses.dataclass
class Pending:
    """The weights of a block that are rounded and not yet emitted: path -> (float weight, packed, its line)."""

    weights: dict[str, tuple[Any, QTensor, CalibrationReport | None]] = dataclasses.field(default_factory=dict)

    def tuned(
        self, tuner: Tuner, name: str, apply: Apply, floats: Any, x: np.ndarray, y: np.ndarray, used: int, emit: Emit
    ) -> Any:
        """Tune the block, emit its weights, and return it dense."""
        packed = floats
        for path, (_, q, _) in self.weights.items():
            packed = put(packed, path.removeprefix(f"{name}/"), q)
        packed, said = tuner(name, apply, packed, x, y, used)
        for path, (leaf, _, line) in self.weights.items():
            note = said if line is None or not line.note else f"{line.note}; {said}"
            q = get(packed, path.removeprefix(f"{name}/"))
            emit(path, leaf, q, None if line is None else dataclasses.replace(line, note=note))
        self.weights.clear()
        return dense_params(packed)


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
