"""Where the weights come from: the tensors of a model file under their GGUF names, mapped one at a time.

A tensor's range of the file is mapped when it is asked for and unmapped when its array is dropped, so the memory in use
is that of the tensors being worked on, not of the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_types import DENSE
from qjax.models.config import DecoderConfig
from qjax.models.families import config_from_gguf, weight_names
from qjax.plan import Weight
from qjax.tensor import dequantize, from_bytes

_ROWS = 1 << 22  # weights unpacked at a time


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of a model file.

    Attributes:
      weight: its names and its shape (out, in).
      type: the ggml type it has in the file.
      file, offset, nbytes: where it lies.
      rope_heads: heads whose rows are permuted on the way into a GGUF file (see `WeightName`).
      add: what is added to every value on that way.
    """

    weight: Weight
    type: str
    file: Path
    offset: int
    nbytes: int
    rope_heads: int | None = None
    add: float = 0.0

    @property
    def name(self) -> str:
        return self.weight.gguf or self.weight.path

    def raw(self) -> np.ndarray:
        """Its bytes in the file, mapped: u8[nbytes]. A hint asks the disk to have them ready."""
        with open(self.file, "rb") as f:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)
            skip = self.offset % mmap.ALLOCATIONGRANULARITY
            if os.fstat(f.fileno()).st_size < self.offset + self.nbytes:
                raise UserError(f"{self.file}: tensor {self.name!r} ends beyond the end of the file: it is truncated")
            if not self.nbytes:
                return np.empty(0, np.uint8)
            mapped = mmap.mmap(f.fileno(), skip + self.nbytes, access=mmap.ACCESS_READ, offset=self.offset - skip)
        return np.frombuffer(mapped, np.uint8)[skip:]

    def read(self) -> np.ndarray:
        """Its values (out, in) as a GGUF file holds them: a view of the mapped file where nothing has to be done."""
        shape = self.weight.shape
        w = self.raw().view(DENSE[self.type]).reshape(shape) if self.type in DENSE else self._unpacked()
        if self.rope_heads is not None:
            # llama.cpp rotates neighbouring rows of a head where Hugging Face rotates its halves.
            heads = w.reshape(self.rope_heads, 2, shape[0] // self.rope_heads // 2, *shape[1:])
            w = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(shape)
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


@dataclasses.dataclass(frozen=True)
class Source:
    """A model file or folder, opened.

    Attributes:
      path: as given.
      config: the decoder.
      metadata: the keys of a GGUF file of this model, tokenizer included, file type excluded.
      tensors: all of them, in no particular order.
      is_gguf: kept tensors keep their types; otherwise vectors become F32, as llama.cpp wants them.
    """

    path: Path
    config: DecoderConfig
    metadata: Mapping[str, Any]
    tensors: tuple[SourceTensor, ...]
    is_gguf: bool

    def fingerprint(self) -> str:
        """Changes when the files do: a hash of every tensor's place, and of its file's size and time of change."""
        files = {t.file for t in self.tensors}
        stats = {f.name: [(s := f.stat()).st_size, s.st_mtime_ns] for f in sorted(files)}
        places = sorted((t.name, t.type, t.file.name, t.offset, t.nbytes, t.rope_heads, t.add) for t in self.tensors)
        return hashlib.sha256(json.dumps([stats, places]).encode()).hexdigest()


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face directory or a GGUF file without reading a weight.

    Raises:
      UserError: no such model, or files that are broken or of an unsupported family.
    """
    path = Path(path)
    if path.suffix == ".gguf" or path.is_file():
        return _open_gguf(path)
    raise UserError(f"{path}: no such model; give a Hugging Face directory or a .gguf file")


def _open_gguf(path: Path) -> Source:
    f = read_gguf(path)
    freqs = f.array("rope_freqs.weight") if "rope_freqs.weight" in f.tensors else None
    config = config_from_gguf(f.metadata, tied="output.weight" not in f.tensors, rope_freqs=freqs)
    paths = {n.gguf: "/".join(n.path) for n in weight_names(config)}
    for name in paths:
        f.entry(name)
    tensors = tuple(
        SourceTensor(Weight(paths.get(e.name, e.name), e.shape, e.name), e.type, path, e.offset, e.nbytes)
        for e in f.tensors.values()
    )
    return Source(path, config, f.metadata, tensors, is_gguf=True)
