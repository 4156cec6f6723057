"""Read and write safetensors, tensor by tensor, single files and sharded checkpoints.

    header length: u64 | header: JSON {name: {dtype, shape, data_offsets}} | tensor data, without gaps

The `safetensors` package checks the header (sizes, overlaps, gaps, overflow) in Rust; tensors are then views of the
mapped file. Source: the format's specification in the safetensors repository.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qjax.errors import UserError
from qjax.io.atomic import atomic_file

FLOATS: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F64": np.dtype("<f8"),
    }
)
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        **FLOATS,
        **{name: np.dtype(code) for name, code in {
            "I8": "i1", "U8": "u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4", "I64": "<i8", "U64": "<u8",
            "BOOL": "?",
        }.items()},
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    }
)  # fmt: skip
"""All that a file may hold, packed weights included."""
DTYPE_NAMES: Mapping[np.dtype[Any], str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of tensors in one file, as Hugging Face's own tools cut


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file, dtype (safetensors' name), shape, and the place of its bytes.

    `made` gives a number of entries of its first axis from the first one wanted on, where the file has it in another
    form than this: (first, count) -> [count, ...]. `packed` gives a weight that the file holds quantized, rows
    (out, in), whose format's name is the dtype.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    made: Callable[[int, int], np.ndarray] | None = None
    packed: Callable[[], Any] | None = None  # -> QTensor


def mapped(stored: Stored, dtype: Any, first: int, count: int) -> np.ndarray:
    """Some entries of a stored tensor along its first axis, mapped for as long as the array lives."""
    span = stored.nbytes // stored.shape[0]
    try:
        raw = np.memmap(stored.path, np.uint8, "r", stored.offset + first * span, (count * span,))
    except (OSError, ValueError) as e:  # gone or cut off since it was opened
        raise UserError(f"cannot read {stored.path}: {e}") from e
    return raw.view(dtype).reshape(count, *stored.shape[1:])


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a file or of a folder's shards.

    Attributes:
      path: the file, or the folder.
      tensors: name -> Stored.
      metadata: what else a single file says.
    """

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def array(self, name: str, dtypes: Mapping[str, np.dtype[Any]] = FLOATS) -> np.ndarray:
        """A tensor of the mapped file, read from disk when touched, mapped for as long as the array lives.

        Raises:
          UserError: no such tensor, or one of another type than `dtypes`, floats unless told otherwise.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name!r}")
        t = self.tensors[name]
        if t.dtype not in dtypes:
            known = ", ".join(dtypes)
            raise UserError(f"{t.path}: tensor {name!r} has type {t.dtype}; expected one of {known}")
        if t.made is not None:
            return t.made(0, t.shape[0])
        if t.nbytes == 0:
            return np.zeros(t.shape, dtypes[t.dtype])
        raw = mapped(dataclasses.replace(t, shape=(t.nbytes,)), np.uint8, 0, t.nbytes)
        if t.offset % dtypes[t.dtype].itemsize:
            raw = raw.copy()  # a header of odd length leaves its tensors unaligned
        return raw.view(dtypes[t.dtype]).reshape(t.shape)


def open_file(path: str | Path) -> Checkpoint:
    """Open one safetensors file.

    Raises:
      UserError: unreadable, truncated or corrupt; names the file.
    """
    path = Path(path)
    metadata, entries = _read(path)
    return Checkpoint(path, entries, metadata)


def open_folder(folder: str | Path) -> Checkpoint:
    """Open a folder's model.safetensors, or the shards of its model.safetensors.index.json.

    Raises:
      UserError: neither is there, a shard is missing, corrupt, or outside the folder, or lacks a tensor that the
        index promises.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}")
        return open_file(folder / SINGLE)
    index = folder / INDEX
    try:
        spec = json.loads(index.read_text("utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {index}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{index}: not valid JSON: {e}") from e
    where = spec.get("weight_map") if isinstance(spec, dict) else None
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise UserError(f"{index}: its weight_map is no object of tensor names to file names")
    shards: dict[str, dict[str, Stored]] = {}
    for name in sorted(set(where.values())):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise UserError(f"{index}: names the shard {name!r}; shards must lie in the same folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder}: shard {name!r}, which {INDEX} names, is missing")
        _, shards[name] = _read(folder / name)
    for tensor, shard in where.items():
        if tensor not in shards[shard]:
            raise UserError(f"{folder / shard}: no tensor {tensor!r}, which {INDEX} says is there")
    return Checkpoint(folder, {tensor: shards[shard][tensor] for tensor, shard in where.items()})


def write_file(
    path: str | Path, infos: Sequence[tuple[str, str, tuple[int, ...]]], tensors: Iterable[np.ndarray]
) -> None:
    """Write a file atomically, one tensor in memory at a time.

    Args:
      path: the final name.
      infos: (name, dtype as "F32", "BF16" ..., shape) of the tensors in the order they will come.
      tensors: arrays of those dtypes and shapes; an iterator is asked for one at a time.
    """
    with atomic_file(path) as f:
        write_tensors(f, infos, tensors, FLOATS, {"format": "pt"})


def write_folder(
    folder: Path,
    infos: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write model.safetensors, or, where there is more than `shard_bytes`, shards of at most so much with their index.

    Args:
      folder: is there, and not yet read by anyone.
      infos, tensors: as for `write_file`. A tensor larger than a shard gets one of its own.
    """
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    sizes = [FLOATS[dtype].itemsize * math.prod(shape) for _, dtype, shape in infos]
    held = 0
    for info, size in zip(infos, sizes, strict=True):
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(info)
        held += size
    rest = iter(tensors)
    if len(shards) == 1:
        return write_file(folder / SINGLE, infos, rest)
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, itertools.islice(rest, len(shard)))
        where |= {tensor: name for tensor, *_ in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(
    f: BinaryIO,
    infos: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[np.ndarray],
    dtypes: Mapping[str, np.dtype[Any]],
    metadata: Mapping[str, str],
) -> None:
    """`write_file` into an open file, of any types, with metadata of one's own."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, dtype, shape in infos:
        end = at + dtypes[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(struct.pack("<Q", len(text)) + text)
    rest = iter(tensors)
    for name, dtype, shape in infos:
        tensor = np.asarray(next(rest), order="C")
        if (tensor.dtype, tensor.shape) != (dtypes[dtype], shape):
            raise UserError(f"tensor {name!r}: expected {dtype}{list(shape)}, got {tensor.dtype}{list(tensor.shape)}")
        f.write(tensor.reshape(-1).view(np.uint8).data)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """What a file's header says: its metadata and tensors."""
    try:
        with safe_open(path, framework="numpy"):  # checks everything that is said in the header
            pass
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as e:
        what = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise UserError(f"{path}: not a readable safetensors file: {' '.join(what.split())}") from e
    metadata, tensors = header.pop("__metadata__", None) or {}, {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return metadata, tensors
