"""Read GGUF files: metadata and memory-mapped tensors, trusting nothing the file says about itself.

    "GGUF" version:u32 n_tensors:u64 n_kv:u64 | kv pairs | tensor infos | pad | tensor data, each padded to `alignment`

Every length, count and offset is checked against the bytes that are left before it is used; Python's integers do not
overflow, and nothing is allocated that the file does not pay for byte by byte. Source: the GGUF specification in ggml;
little-endian versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.gguf_types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    DENSE,
    MAGIC,
    MAX_DIMS,
    MAX_NAME,
    SCALARS,
    STRING,
    TENSOR_TYPE_OF_ID,
    TENSOR_TYPES,
)
from qjax.tensor import QTensor, from_bytes

MAX_KEY = 65535  # bytes, by the specification
MAX_NESTING = 2  # arrays of arrays; no known key nests at all
_MIN_KV = 8 + 4 + 1  # key length, type, at least one byte of value
_MIN_INFO = 8 + 4 + 4 + 8  # name length, number of dims, type, offset


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `shape` in numpy's order (rows first, contracted axis last), `offset` in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file.

    Attributes:
      path: the file.
      version: 2 or 3.
      metadata: key -> bool, int, float, str, or a list of these.
      kinds: key -> the type of a number, or of the numbers of a list.
      tensors: name -> TensorEntry, in the file's order.
      data: the whole file, mapped into memory: u8[size].
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    data: np.ndarray
    kinds: Mapping[str, np.dtype[Any]] = dataclasses.field(default_factory=dict)

    def typed(self, key: str) -> Any:
        """A value of the metadata in the file's own type, for `write_gguf` to write as it was."""
        value, kind = self.metadata[key], self.kinds.get(key)
        if kind is None:
            return value
        return np.array(value, kind) if isinstance(value, list) else kind.type(value)

    def entry(self, name: str) -> TensorEntry:
        """The entry of a tensor; UserError where the file lacks it."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name!r}")
        return self.tensors[name]

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes, u8[nbytes]: a view of the mapped file, read from disk when touched."""
        e = self.entry(name)
        return self.data[e.offset : e.offset + e.nbytes]

    def array(self, name: str) -> np.ndarray:
        """A tensor of a plain type (F32, F16, BF16, F64, integers) as a view of the mapped file, in its shape."""
        e = self.entry(name)
        if e.type not in DENSE:
            raise UserError(f"{self.path}: tensor {name!r} has type {e.type}, which is packed: read it with qtensor")
        return self.raw(name).view(DENSE[e.type]).reshape(e.shape)

    def qtensor(self, name: str) -> QTensor:
        """A tensor of a block type as a QTensor with blocks along its last axis; its bytes are the file's."""
        e = self.entry(name)
        try:
            return from_bytes(e.type, self.raw(name), e.shape)
        except UserError as error:
            raise UserError(f"{self.path}: tensor {name!r}: {error}") from error


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file.

    Args:
      path: a little-endian GGUF file of version 2 or 3.

    Raises:
      UserError: not a GGUF file, another version or byte order, or truncated or inconsistent; names the file, the
        place and what is wrong there.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size < 24:
            raise UserError(f"{path}: not a GGUF file: {size} bytes are too few for a header")
        data = np.memmap(path, np.uint8, mode="r")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    cursor = _Cursor(path, data)
    if cursor.take(4, "magic") != MAGIC:
        raise UserError(f"{path}: not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.unpack("<I", "version")
    if version not in (2, 3):
        big_endian = version in (2 << 24, 3 << 24)
        what = "big-endian GGUF is not supported" if big_endian else f"GGUF version {version} is not 2 or 3"
        raise UserError(f"{path}: {what}; convert the file with a current llama.cpp")
    n_tensors = cursor.count("number of tensors", _MIN_INFO)
    n_kv = cursor.count("number of keys", _MIN_KV)
    metadata: dict[str, Any] = {}
    kinds: dict[str, np.dtype[Any]] = {}
    for i in range(n_kv):
        key = cursor.string(f"key {i}", MAX_KEY)
        if not key or key in metadata:
            raise cursor.error(f"key {key!r} appears twice" if key else f"key {i} is empty")
        kind = cursor.unpack("<I", f"type of {key!r}")
        of = cursor.ahead() if kind == ARRAY else kind
        metadata[key] = cursor.value(kind, f"value of {key!r}")
        if of in SCALARS:
            kinds[key] = np.dtype(bool) if of == BOOL else SCALARS[of]
    return GGUFFile(path, version, metadata, _tensor_infos(cursor, n_tensors, metadata), data, kinds)


def _tensor_infos(cursor: _Cursor, n_tensors: int, metadata: dict[str, Any]) -> dict[str, TensorEntry]:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {str(alignment)[:40]!r}, not a power of two")
    found: list[tuple[str, tuple[int, ...], str, int, int]] = []
    for i in range(n_tensors):
        name = cursor.string(f"name of tensor {i}", MAX_NAME)
        n_dims = cursor.unpack("<I", f"number of dims of {name!r}")
        if n_dims > MAX_DIMS:
            raise cursor.error(f"tensor {name!r} has {n_dims} dims; at most {MAX_DIMS} are allowed")
        dims = [cursor.unpack("<Q", f"dims of {name!r}") for _ in range(n_dims)]
        type_id = cursor.unpack("<I", f"type of {name!r}")
        offset = cursor.unpack("<Q", f"offset of {name!r}")
        if type_id not in TENSOR_TYPE_OF_ID:
            raise cursor.error(f"tensor {name!r} has the unknown type {type_id}")
        kind = TENSOR_TYPE_OF_ID[type_id]
        row = dims[0] if dims else 1
        if 0 in dims or row % kind.block:
            why = (
                "0 among its dims" if 0 in dims else f"rows of {row} weights, no multiple of {kind.name}'s {kind.block}"
            )
            raise cursor.error(f"tensor {name!r} has {why}")
        if offset % alignment:
            raise cursor.error(f"tensor {name!r} begins at {offset}, no multiple of the alignment {alignment}")
        found.append((name, tuple(reversed(dims)), kind.name, offset, kind.nbytes(math.prod(dims))))
    start = -(-cursor.at // alignment) * alignment
    entries: dict[str, TensorEntry] = {}
    end = start
    for name, shape, type_name, offset, nbytes in found:
        if name in entries:
            raise cursor.error(f"tensor {name!r} appears twice")
        entry = TensorEntry(name, shape, type_name, start + offset, nbytes)
        if entry.offset < end:
            raise cursor.error(f"tensor {name!r} overlaps the one before it")
        end = entry.offset + nbytes
        if end > cursor.size:
            raise cursor.error(
                f"truncated: tensor {name!r} ({type_name} {list(shape)}) ends at byte {end} of {cursor.size}"
            )
        entries[name] = entry
    return entries


class _Cursor:
    """A place in the file that only moves forward, by amounts it has checked."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.size, self.at = path, data.data, len(data), 0

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: corrupt GGUF file: {what}")

    def take(self, n: int, what: str) -> memoryview:
        if n > self.size - self.at:
            raise self.error(f"the {what} needs {n} bytes at {self.at}, but the file ends at {self.size}")
        self.at += n
        return self.data[self.at - n : self.at]

    def unpack(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def ahead(self) -> int:
        """The u32 that comes next."""
        return int.from_bytes(self.data[self.at : self.at + 4], "little")

    def count(self, what: str, least: int) -> int:
        """A u64 count of things that take at least `least` bytes each."""
        n = self.unpack("<Q", what)
        if n * least > self.size - self.at:
            raise self.error(f"the {what} is {n}, more than the file has room for")
        return n

    def string(self, what: str, longest: int | None = None) -> str:
        n = self.unpack("<Q", f"length of the {what}")
        if longest is not None and n > longest:
            raise self.error(f"the {what} has {n} bytes; at most {longest} are allowed")
        try:
            return str(self.take(n, what), "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the {what} is not UTF-8") from None

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, depth)
        if kind not in SCALARS:
            raise self.error(f"the {what} has the unknown type {kind}")
        return self.scalars(kind, 1, what)[0]

    def scalars(self, kind: int, n: int, what: str) -> list[Any]:
        dtype = SCALARS[kind]
        values = np.frombuffer(self.take(n * dtype.itemsize, what), dtype)
        if kind == BOOL and np.any(values > 1):
            raise self.error(f"the {what} is a bool that is neither 0 nor 1")
        return (values != 0).tolist() if kind == BOOL else values.tolist()

    def array(self, what: str, depth: int) -> list[Any]:
        kind = self.unpack("<I", f"element type of the {what}")
        if kind == ARRAY and depth + 1 >= MAX_NESTING:
            raise self.error(f"the {what} nests arrays more than {MAX_NESTING} deep")
        if kind not in (STRING, ARRAY) and kind not in SCALARS:
            raise self.error(f"the {what} has elements of the unknown type {kind}")
        n = self.count(f"length of the {what}", SCALARS[kind].itemsize if kind in SCALARS else 8)
        if kind in SCALARS:
            return self.scalars(kind, n, what)
        return [self.value(kind, what, depth + 1) for _ in range(n)]


__all__ = ["TENSOR_TYPES", "GGUFFile", "TensorEntry", "read_gguf"]
