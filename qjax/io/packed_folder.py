"""A folder in a container's layout, filled weight by weight in any order: what `qjax export` writes.

It appears under its name whole or not at all. Weights that are packed go through the container, all others are floats
of one type. Families whose folders have experts or linear attention in a form of their own keep those as floats.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.atomic import atomic_dir
from qjax.io.expert_stacks import Info
from qjax.io.exports.container import WEIGHT, Container
from qjax.io.folder_facts import Known, write_facts
from qjax.io.huggingface import in_folder
from qjax.io.linear_heads import order_of
from qjax.io.onnx_file import ONNX, OnnxFile
from qjax.io.safetensors import FLOATS, SHARD_BYTES
from qjax.io.shards import Shards, room
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, family_of, weight_names
from qjax.tensor import QTensor

_TENSORS = 7  # of one packed weight, at most
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@runtime_checkable
class Sink(Protocol):
    """Where the tensors go, in any order."""

    def put(self, name: str, array: np.ndarray) -> None:
        """Write a tensor."""

    def close(self) -> None:
        """All are there."""


class PackedFolder:
    """A folder on its way."""

    def __init__(self, path: Path, sink: Sink, config: DecoderConfig, container: Container, dtype: str):
        self._path = path
        self._sink, self._config, self._container, self._dtype = sink, config, container, _DTYPES[dtype]

    def packed(self, w: WeightName, q: QTensor) -> int:
        """Write a packed weight, rows (out, in), or a stack of them; returns its bytes.

        Raises:
          UserError: values that the container cannot hold; it names the weight.
        """
        parts = [q] if w.hf_shape == w.file_shape else [
            jax.tree.map(lambda leaf, i=i: leaf[i], q) for i in range(w.file_shape[0])
        ]  # fmt: skip
        nbytes = 0
        for name, part in zip(w.hf_names, parts, strict=True):
            try:
                arrays = self._container.tensors(part)
            except UserError as e:
                raise UserError(f"{name}: {e}") from None
            for suffix, array in arrays.items():
                self._sink.put(name.removesuffix(WEIGHT) + suffix, array)
                nbytes += array.nbytes
        return nbytes

    def floats(self, weights: Iterable[tuple[WeightName, Callable[[], np.ndarray]]]) -> None:
        """Write all weights that are not packed, in the order of `weight_names`; each is made when its turn comes."""
        listed = list(weights)
        infos: list[Info] = [(name, self._dtype, w.hf_shape) for w, _ in listed for name in w.hf_names]
        found, arrays = in_folder(self._config, infos, self._in_turn(listed))
        for (name, *_), array in zip(found, arrays, strict=True):
            self._sink.put(name, array)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what is wanted on the way; it goes when the body ends, or with this one."""
        with tempfile.TemporaryDirectory(dir=self._path) as path:
            yield Path(path)

    def _in_turn(self, listed: list[tuple[WeightName, Callable[[], np.ndarray]]]) -> Iterator[np.ndarray]:
        for w, made in listed:
            yield from made().astype(FLOATS[self._dtype]).reshape(-1, *w.hf_shape)


def check_packed(container: Container, config: DecoderConfig, formats: Mapping[str, Format]) -> None:
    """Raise UserError where a container has no place for one of some weights, before any work.

    Args:
      formats: {path: format} of the weights to be packed.
    """
    for w in weight_names(config):
        path = "/".join(w.path)
        if path not in formats:
            continue
        if not container.everything and w.path[0] in ("embed", "head"):
            raise UserError(f"{path}: {container.name} packs linear layers of the blocks only; keep it (plan: keep)")
        fused = family_of(config).expert_columns and "experts" in w.path
        if fused or (config.linear is not None and order_of(w.hf, config.linear) is not None):
            raise UserError(
                f"{path}: folders of {config.family} have it joined or in another order, which packed weights cannot "
                "follow; keep it (plan: keep), or write GGUF"
            )
        try:
            container.check(formats[path], w.hf_shape)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None


def says(container: Container, config: DecoderConfig, formats: Mapping[str, Format]) -> dict[str, object]:
    """What config.json will say of packed weights; arguments as for `check_packed`."""
    packed: dict[str, Format] = {}
    floats: list[str] = []
    for w in weight_names(config):
        path = "/".join(w.path)
        modules = [name.removesuffix(WEIGHT) for name in w.hf_names]
        if path in formats:
            packed |= dict.fromkeys(modules, formats[path])
        elif w.transposed:
            floats += modules
    if config.tied:
        floats.append("lm_head")
    return container.settings(packed, floats)


@contextmanager
def packed_folder(
    out: str | Path,
    container: Container,
    model: Known,
    formats: Mapping[str, Format],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[PackedFolder]:
    """Make a folder that gets its name when the body ends without an exception.

    Args:
      out: the final name.
      container: the layout.
      model: whose config, tokenizer and card go there.
      formats: {path: format} of the weights that will be packed.
      dtype: of the others: "float32", "bfloat16" or "float16".
      shard_bytes: of one file, at most.

    Raises:
      UserError: as `Container.settings`; a full disk.
    """
    further = says(container, model.config, formats)
    names = [name for w in weight_names(model.config) for name in w.hf_names]
    with atomic_dir(out) as folder:
        write_facts(folder, model, dtype, further)
        sink: Sink = Shards(folder, room(names, _TENSORS), shard_bytes)
        if container.name == ONNX:
            sink = OnnxFile(folder, model.config)
        yield PackedFolder(folder, sink, model.config, container, dtype)
        sink.close()
