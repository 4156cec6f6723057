"""What a container is: how one kind of checkpoint spells a packed weight, both ways, without arithmetic on its values.

    model.layers.0.mlp.up_proj.weight, packed    <->    ....qweight  ....qzeros  ....scales  ....g_idx       (GPTQ)

Weights are rows (out, in) here, as Hugging Face has them. Writing takes a QTensor apart into arrays; reading replaces
a weight's tensors by one `Stored` whose `packed` puts them together again when it is asked for, so a checkpoint is
opened from its headers alone and a weight is in memory only while it is worked on. What a container has no place for,
`check` says before any work, from the format alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.safetensors import DTYPES, Checkpoint, Stored
from qjax.tensor import QTensor

WEIGHT = ".weight"
Settings = Mapping[str, Any]


@runtime_checkable
class Reader(Protocol):
    """A kind of checkpoint that is read; a frozen record."""

    @property
    def name(self) -> str:
        """What `qjax export --to` calls it, where it is written too."""

    def reads(self, config: Settings) -> bool:
        """Whether a config.json is of this kind."""

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        """A folder's tensors with its packed weights in one piece each; no weight is read.

        Raises:
          UserError: a tensor that is missing, too many, or of another type or shape than config.json says.
        """


@runtime_checkable
class Container(Reader, Protocol):
    """A kind of checkpoint that is written as well."""

    @property
    def about(self) -> str:
        """What it holds, in a line."""

    @property
    def everything(self) -> bool:
        """Whether embeddings and the head may be packed too; otherwise linear layers of the blocks alone."""

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        """Raise UserError, which says what would fit, where a weight (out, in) of this format has no place."""

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        """The arrays of one weight, by what stands behind its module's name (".qweight").

        Raises:
          UserError: values that the container cannot hold, as a scale beyond its type.
        """

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        """What config.json says of it.

        Args:
          packed: {module: format} of the packed weights.
          floats: modules of the matrices that stay floats.

        Raises:
          UserError: one checkpoint cannot hold these formats together.
        """


@dataclasses.dataclass(frozen=True)
class Members:
    """The tensors of one weight in a folder, by what stands behind its module's name."""

    module: str
    tensors: Mapping[str, Stored]
    checkpoint: Checkpoint

    def shaped(self, suffix: str, dtypes: str | Sequence[str], shape: tuple[int, ...] | None = None) -> Stored:
        """One of them. Raises UserError where it has another type or shape."""
        found = self.tensors[suffix]
        dtypes = (dtypes,) if isinstance(dtypes, str) else dtypes
        where = f"{found.path}: tensor {self.module + suffix!r}"
        if found.dtype not in dtypes:
            raise UserError(f"{where} has type {found.dtype}; expected {' or '.join(dtypes)}")
        if shape is not None and found.shape != shape:
            raise UserError(f"{where} has shape {list(found.shape)}; its codes and config.json ask for {list(shape)}")
        return found

    def matrix(self, suffix: str, dtypes: str | Sequence[str]) -> tuple[int, int]:
        """Rows and columns of one of them. Raises UserError where it has another type, or is no matrix."""
        shape = self.shaped(suffix, dtypes).shape
        if len(shape) != 2 or 0 in shape:
            where = f"{self.tensors[suffix].path}: tensor {self.module + suffix!r}"
            raise UserError(f"{where} has shape {list(shape)}; expected a matrix")
        return shape[0], shape[1]

    def array(self, suffix: str) -> np.ndarray:
        """One of them, mapped."""
        return self.checkpoint.array(self.module + suffix, DTYPES)


def members(checkpoint: Checkpoint, key: str, beside: Iterable[str], maybe: Iterable[str] = ()) -> dict[str, Members]:
    """The packed weights of a folder.

    Args:
      checkpoint: of the folder.
      key: what stands behind the module's name in the tensor of codes.
      beside, maybe: the same of the tensors that go with it, and of those that may.

    Returns: {module: its tensors}.

    Raises:
      UserError: one of `beside` is missing, or the weight is there as floats as well.
    """
    beside, maybe, found = tuple(beside), tuple(maybe), {}
    for name in checkpoint.tensors:
        if not name.endswith(key):
            continue
        module = name.removesuffix(key)
        for suffix in beside:
            if module + suffix not in checkpoint.tensors:
                raise UserError(f"{checkpoint.path}: tensor {module + suffix!r} is missing; {name!r} needs it")
        if WEIGHT not in (key, *beside) and module + WEIGHT in checkpoint.tensors:
            raise UserError(f"{checkpoint.path}: the weight of {module!r} is there twice, packed and as floats")
        suffixes = (key, *beside, *(s for s in maybe if module + s in checkpoint.tensors))
        found[module] = Members(module, {s: checkpoint.tensors[module + s] for s in suffixes}, checkpoint)
    return found


def joined(
    checkpoint: Checkpoint,
    weights: Mapping[str, Members],
    shape_of: Callable[[Members], tuple[tuple[int, ...], Format]],
    put: Callable[[Members, dict[str, np.ndarray]], QTensor],
) -> Checkpoint:
    """A checkpoint with each packed weight as one tensor under the name it would have as floats.

    Args:
      checkpoint, weights: as `members` has them.
      shape_of: checks a weight's tensors by their headers and says its shape (out, in) and format.
      put: makes the weight of its arrays.
    """
    tensors = dict(checkpoint.tensors)
    for module, m in weights.items():
        try:
            shape, format = shape_of(m)
        except UserError as e:
            raise e if str(checkpoint.path) in str(e) else UserError(f"{checkpoint.path}: {module!r}: {e}") from None
        for suffix in m.tensors:
            del tensors[module + suffix]

        def packed(m: Members = m) -> QTensor:
            try:
                return put(m, {suffix: m.array(suffix) for suffix in m.tensors})
            except UserError as e:
                raise UserError(f"{checkpoint.path}: {m.module!r}: {e}") from None

        first = next(iter(m.tensors.values()))
        nbytes = sum(stored.nbytes for stored in m.tensors.values())
        tensors[module + WEIGHT] = Stored(first.path, format.name, shape, first.offset, nbytes, packed=packed)
    return dataclasses.replace(checkpoint, tensors=tensors)


def one_format(packed: Mapping[str, Format], who: str) -> Format:
    """The format of all packed weights. Raises UserError where there are several."""
    formats = {f.name: f for f in packed.values()}
    if len(formats) > 1:
        first, second = sorted(formats)[:2]
        raise UserError(
            f"{who} says one format for all its weights, and these have {first}, {second}"
            f"{' ...' if len(formats) > 2 else ''}; compressed-tensors holds several"
        )
    return next(iter(formats.values()))


def said_of(config: Settings) -> Settings:
    """What a config.json says of quantization."""
    said = config.get("quantization_config", config.get("quantization"))
    return said if isinstance(said, Mapping) else {}


def number_of(path: Path, said: Settings, key: str, allowed: Sequence[int], default: int | None = None) -> int:
    """A whole number of a config. Raises UserError where it is none, or not allowed."""
    value = said.get(key, default)
    if type(value) is not int or value not in allowed:
        among = "a whole number" if isinstance(allowed, range) else " or ".join(map(str, allowed))
        raise UserError(f"{path}: config.json: quantization of {key} = {value!r} is not read; expected {among}")
    return value
