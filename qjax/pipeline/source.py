"""Where weights come from: an opened model, its tensors under their GGUF names, its parts as a params tree."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qjax.errors import UserError
from qjax.evaluate.sizes import Sizes, counted
from qjax.io.checkpoint import locate
from qjax.io.gguf_model import card_of as card_of_gguf
from qjax.io.gguf_model import further, metadata_of, open_gguf_model
from qjax.io.gguf_types import DENSE
from qjax.io.huggingface import card_of, get_leaf, open_model
from qjax.io.llama2c import load_llama2c
from qjax.io.multimodal import language_settings
from qjax.io.safetensors import FLOATS, Checkpoint
from qjax.io.tokenizer_gguf import tokenizer_from_gguf
from qjax.io.tokenizer_hf import read_json, read_tokenizer
from qjax.models.card import Card, stops_of
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, rope_tensors, weight_names
from qjax.models.parts import Table
from qjax.pipeline.source_tensor import SourceTensor
from qjax.plan import Weight
from qjax.tensor import QTensor
from qjax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A model, opened.

    Attributes:
      path: where it lies.
      config: the decoder.
      tensors: all of them, in no particular order.
      is_gguf: kept tensors keep their types; otherwise vectors become F32, as llama.cpp wants them.
      read_tokenizer, read_card, read_metadata: what `tokenizer`, `card` and `metadata` are the results of.
    """

    path: Path
    config: DecoderConfig
    tensors: tuple[SourceTensor, ...]
    is_gguf: bool
    read_tokenizer: Callable[[], Tokenizer | None]
    read_card: Callable[[], Card]
    read_metadata: Callable[[], Mapping[str, Any]]

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Read when it is first asked for, as the next two are."""
        return self.read_tokenizer()

    @cached_property
    def card(self) -> Card:
        """What else the files say."""
        return self.read_card()

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The keys of a GGUF file of this model, tokenizer included."""
        return self.read_metadata()

    @property
    def stops(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return stops_of(self.tokenizer, self.card)

    def part(self, name: str) -> dict[str, Any]:
        """A part of the params tree, read now: "embed", "layers_3", "final_norm", "head"; float32."""
        tree: dict[str, Any] = {}
        for w in self._names[name]:
            at = tree
            for key in w.path[1:-1]:
                at = at.setdefault(key, {})
            leaf = self._by_path["/".join(w.path)].flax_leaf(w, self.is_gguf)
            at[w.path[-1]] = jax.device_put(leaf)
        return tree

    def table(self, name: str) -> Table:
        """Tokens i[n] -> their rows f32[n, dim] of the part "embed" or "head", read when they are asked for."""
        (w,) = self._names[name]
        return self._by_path["/".join(w.path)].rows

    def leaf(self, w: WeightName) -> np.ndarray:
        """One weight as the decoder holds it, read now: f32."""
        return self._by_path["/".join(w.path)].flax_leaf(w, self.is_gguf)

    def type_of(self, w: WeightName) -> str:
        """The type that the files have a weight in: a float's, a ggml type or a format's name."""
        return self._by_path["/".join(w.path)].type

    def packed(self, w: WeightName) -> QTensor | None:
        """One weight as it is packed, rows (out, in) of Hugging Face's order, or a stack of them; None: floats."""
        return self._by_path["/".join(w.path)].qtensor(w, self.is_gguf)

    @cached_property
    def sizes(self) -> Sizes:
        """What its weights take in their files."""
        weights = [self._by_path["/".join(w.path)] for names in self._names.values() for w in names]
        return counted((math.prod(t.weight.shape), t.nbytes, t.type not in DENSE) for t in weights)

    @cached_property
    def _names(self) -> dict[str, list[WeightName]]:
        parts: dict[str, list[WeightName]] = {}
        for w in weight_names(self.config):
            parts.setdefault(w.path[0], []).append(w)
        return parts

    @cached_property
    def _by_path(self) -> dict[str, SourceTensor]:
        return {t.weight.path: t for t in self.tensors}

    def fingerprint(self) -> str:
        """Changes when the weights may have: a hash of every tensor's place, of the files' sizes and times of change,
        and of the values that lie in no file."""
        h = hashlib.sha256()
        every = sorted(self.tensors, key=lambda t: t.name)
        for t in (one for whole in every for one in whole.pieces):
            place: list[Any] = [t.name, t.type, t.rope_heads, t.add, t.decay]
            if t.values is None:
                stat = t.file.stat()
                place += [t.file.name, t.offset, t.nbytes, stat.st_size, stat.st_mtime_ns]
            h.update(json.dumps(place).encode())
            if t.values is not None:
                h.update(t.values.tobytes())
        return h.hexdigest()


def open_source(path: str | Path, pre: str | None = None) -> Source:
    """Open a model without reading its weights (those of a llama2.c file excepted, which are small).

    Args:
      path: a Hugging Face directory, a GGUF file, a llama2.c file, or a built-in name.
      pre: llama.cpp's name of the pre-tokenizer, where the tokenizer does not know it.

    Raises:
      UserError: no such model, no tokenizer, or files that are broken or of an unsupported family.
    """
    path = locate(path)
    if path.is_dir():
        return _open_folder(path, pre)
    if path.suffix == ".gguf":
        return _open_gguf(path, pre)
    model = load_llama2c(path)
    leaves = {w.gguf: get_leaf(model.params, w) for w in weight_names(model.config)}
    tensors = [
        _tensor(w, "F32", values=np.ascontiguousarray(w.turned(leaves[w.gguf]), np.float32))
        for w in weight_names(model.config)
    ]
    return _converted(path, model.config, lambda: model.tokenizer, lambda: model.card, tensors, pre)


def _open_folder(path: Path, pre: str | None) -> Source:
    config, checkpoint = open_model(path)
    tensors = []
    for w in weight_names(config):
        parts = tuple(_of_checkpoint(w, name, checkpoint) for name in w.hf_names)
        kinds = {part.type for part in parts}
        if len(kinds) > 1:
            raise UserError(f"{path}: the experts of {w.hf!r} have different types, {' and '.join(sorted(kinds))}")
        whole = parts[0] if len(parts) == 1 else _tensor(w, parts[0].type, parts=parts)
        tensors.append(whole)
    facts = read_json(path / "config.json")
    settings, tokenizer = language_settings(facts), cache(lambda: read_tokenizer(path, facts))
    return _converted(path, config, tokenizer, lambda: card_of(path, settings, config, checkpoint), tensors, pre)


def _of_checkpoint(w: WeightName, name: str, checkpoint: Checkpoint) -> SourceTensor:
    """One tensor of a folder: a weight, or a matrix of a stack."""
    t = checkpoint.tensors[name]
    if t.dtype not in FLOATS and t.made is None and t.packed is None:
        raise UserError(f"{t.path}: tensor {name!r} has type {t.dtype}; expected one of {', '.join(FLOATS)}")
    made = _tensor(w, t.dtype, file=t.path, offset=t.offset, nbytes=t.nbytes, made=t.made, packed=t.packed)
    return dataclasses.replace(made, weight=dataclasses.replace(made.weight, shape=w.hf_shape))


def _tensor(w: WeightName, kind: str, **where: Any) -> SourceTensor:
    if "values" in where:
        where["nbytes"] = where["values"].nbytes
    if "parts" in where:
        where["nbytes"] = sum(part.nbytes for part in where["parts"])
    weight = Weight("/".join(w.path), w.file_shape, w.gguf)
    return SourceTensor(weight, kind, rope_heads=w.rope_heads, add=w.offset, decay=w.decay, **where)


def _converted(
    path: Path,
    config: DecoderConfig,
    tokenizer: Callable[[], Tokenizer | None],
    card: Callable[[], Card],
    tensors: list[SourceTensor],
    pre: str | None,
) -> Source:
    """A source that was no GGUF file and gets the metadata of one where it is asked for."""
    for name, table in rope_tensors(config).items():
        tensors.append(SourceTensor(Weight(name, table.shape, name), "F32", values=table, nbytes=table.nbytes))

    def metadata() -> Mapping[str, Any]:
        found = tokenizer()
        if found is None:
            raise UserError(
                f"{path}: has no tokenizer, and llama.cpp loads no file without one; put tokenizer.json there"
            )
        return metadata_of(config, found, pre, path.resolve().stem, "F32")

    return Source(path, config, tuple(tensors), False, tokenizer, card, metadata)


def _open_gguf(path: Path, pre: str | None) -> Source:
    config, file = open_gguf_model(path)
    paths, passed = {w.gguf: "/".join(w.path) for w in weight_names(config)}, further(config, file)

    def tensors() -> Iterator[SourceTensor]:
        for e in (file.tensors[name] for name in file.tensors if name not in passed):
            weight = Weight(paths.get(e.name, e.name), e.shape, e.name)
            yield SourceTensor(weight, e.type, path, e.offset, e.nbytes)

    def tokenizer() -> Tokenizer | None:
        try:
            return tokenizer_from_gguf(file.metadata, pre)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e

    def metadata() -> Mapping[str, Any]:
        said = {key: file.typed(key) for key in file.metadata} | ({} if pre is None else {"tokenizer.ggml.pre": pre})
        if passed:
            arch = file.metadata["general.architecture"]
            del said[f"{arch}.nextn_predict_layers"]
            said[f"{arch}.block_count"] = np.uint32(config.layers)
        return said

    return Source(path, config, tuple(tensors()), True, tokenizer, lambda: card_of_gguf(file), metadata)
