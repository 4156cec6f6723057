"""Where the weights come from: the tensors of a model under their GGUF names, mapped into memory one at a time.

A tensor's range of the file is mapped when it is asked for and unmapped when its array is dropped, so the memory in use
is that of the tensors being worked on, not of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.checkpoint import locate
from qjax.io.gguf_model import ROPE_FREQS, metadata_of, open_gguf_model
from qjax.io.gguf_types import DENSE
from qjax.io.huggingface import file_shape, get_leaf, open_model
from qjax.io.llama2c import load_llama2c
from qjax.io.rope_rows import to_pairs
from qjax.io.safetensors import FLOATS
from qjax.io.tokenizer_hf import read_json, read_tokenizer
from qjax.models.config import DecoderConfig
from qjax.models.families import WeightName, rope_freqs, weight_names
from qjax.plan import Weight
from qjax.tensor import dequantize, from_bytes
from qjax.tokenizer import Tokenizer

_ROWS = 1 << 22  # weights unpacked at a time


@dataclasses.dataclass(frozen=True, eq=False)
class SourceTensor:
    """One tensor of a model.

    Attributes:
      weight: its names and its shape (out, in).
      type: the ggml type it has.
      file, offset, nbytes: where it lies; or
      values: the tensor itself, where no file holds it in this form.
      rope_heads: heads whose rows are permuted on the way into a GGUF file (see `WeightName`).
      add: what is added to every value on that way.
    """

    weight: Weight
    type: str
    file: Path = Path()
    offset: int = 0
    nbytes: int = 0
    values: np.ndarray | None = None
    rope_heads: int | None = None
    add: float = 0.0

    @property
    def name(self) -> str:
        return self.weight.gguf or self.weight.path

    @property
    def is_changed(self) -> bool:
        """Whether its bytes in a GGUF file differ from those here."""
        return self.rope_heads is not None or self.add != 0.0

    def raw(self) -> np.ndarray:
        """Its bytes: u8[nbytes], mapped. A hint asks the disk to have them ready."""
        if self.values is not None:
            return self.values.reshape(-1).view(np.uint8)
        with open(self.file, "rb") as f:
            if os.fstat(f.fileno()).st_size < self.offset + self.nbytes:  # touching the rest would kill the process
                raise UserError(f"{self.file}: tensor {self.name!r} ends beyond the file's end; the file is truncated")
            if self.nbytes == 0:
                return np.empty(0, np.uint8)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)
            skip = self.offset % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(f.fileno(), skip + self.nbytes, access=mmap.ACCESS_READ, offset=self.offset - skip)
        return np.frombuffer(mapped, np.uint8)[skip:]

    def read(self) -> np.ndarray:
        """Its values (out, in) as a GGUF file holds them: a view of the mapped file where nothing has to be done."""
        shape = self.weight.shape
        if self.type in DENSE:
            raw, dtype = self.raw(), DENSE[self.type]
            raw = raw.copy() if self.values is None and self.offset % dtype.itemsize else raw
            w = raw.view(dtype).reshape(shape)
        else:
            w = self._unpacked()
        if self.rope_heads is not None:
            w = to_pairs(w, self.rope_heads)
        return (w.astype(np.float32) + np.float32(self.add)) if self.add else w

    def _unpacked(self) -> np.ndarray:
        shape = self.weight.shape
        out = np.empty(shape, np.float32)
        flat = out.reshape(-1, shape[-1])
        raw = self.raw().reshape(len(flat), -1)
        step = max(1, _ROWS // shape[-1])
        for at in range(0, len(flat), step):
            q = from_bytes(self.type, raw[at : at + step].reshape(-1), flat[at : at + step].shape)
            flat[at : at + step] = np.asarray(dequantize(q))
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A model, opened.

    Attributes:
      path: where it lies.
      config: the decoder.
      metadata: the keys of a GGUF file of this model, tokenizer included.
      tensors: all of them, in no particular order.
      is_gguf: kept tensors keep their types; otherwise vectors become F32, as llama.cpp wants them.
    """

    path: Path
    config: DecoderConfig
    metadata: Mapping[str, Any]
    tensors: tuple[SourceTensor, ...]
    is_gguf: bool

    def fingerprint(self) -> str:
        """Changes when the weights may have: a hash of every tensor's place, of the files' sizes and times of change,
        and of the values that lie in no file."""
        h = hashlib.sha256()
        for t in sorted(self.tensors, key=lambda t: t.name):
            place: list[Any] = [t.name, t.type, t.rope_heads, t.add]
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
        _tensor(w, "F32", values=np.ascontiguousarray(leaves[w.gguf].T if w.transposed else leaves[w.gguf], np.float32))
        for w in weight_names(model.config)
    ]
    return _converted(path, model.config, model.tokenizer, tensors, pre)


def _open_folder(path: Path, pre: str | None) -> Source:
    config, checkpoint = open_model(path)
    tensors = []
    for w in weight_names(config):
        t = checkpoint.tensors[w.hf]
        if t.dtype not in FLOATS:
            raise UserError(f"{t.path}: tensor {w.hf!r} has type {t.dtype}; expected one of {', '.join(FLOATS)}")
        tensors.append(_tensor(w, t.dtype, file=t.path, offset=t.offset, nbytes=t.nbytes))
    tokenizer = read_tokenizer(path, read_json(path / "config.json"))
    return _converted(path, config, tokenizer, tensors, pre)


def _tensor(w: WeightName, kind: str, **where: Any) -> SourceTensor:
    if "values" in where:
        where["nbytes"] = where["values"].nbytes
    weight = Weight("/".join(w.path), file_shape(w), w.gguf)
    return SourceTensor(weight, kind, rope_heads=w.rope_heads, add=w.offset, **where)


def _converted(
    path: Path, config: DecoderConfig, tokenizer: Tokenizer | None, tensors: list[SourceTensor], pre: str | None
) -> Source:
    """A source that was no GGUF file and gets the metadata of one."""
    if tokenizer is None:
        raise UserError(f"{path}: has no tokenizer, and llama.cpp loads no file without one; put tokenizer.json there")
    freqs = rope_freqs(config)
    if freqs is not None:
        weight = Weight(ROPE_FREQS, freqs.shape, ROPE_FREQS)
        tensors.append(SourceTensor(weight, "F32", values=freqs, nbytes=freqs.nbytes))
    metadata = metadata_of(config, tokenizer, pre, path.resolve().stem, "F32")
    return Source(path, config, metadata, tuple(tensors), is_gguf=False)


def _open_gguf(path: Path, pre: str | None) -> Source:
    config, file = open_gguf_model(path)
    paths = {w.gguf: "/".join(w.path) for w in weight_names(config)}

    def tensors() -> Iterator[SourceTensor]:
        for e in file.tensors.values():
            weight = Weight(paths.get(e.name, e.name), e.shape, e.name)
            yield SourceTensor(weight, e.type, path, e.offset, e.nbytes)

    metadata = dict(file.metadata) | ({} if pre is None else {"tokenizer.ggml.pre": pre})
    return Source(path, config, metadata, tuple(tensors()), is_gguf=True)
