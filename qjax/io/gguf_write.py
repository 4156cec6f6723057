"""Write GGUF files tensor by tensor: the header is complete before the first weight exists.

    "GGUF" 3 n_tensors n_kv | kv pairs | tensor infos | pad to 32 | tensor, pad to 32 | tensor, pad to 32 ...

Names, shapes and types fix every offset, so tensors stream: each is written, padded and freed before the next is asked
for. Source: the GGUF specification in ggml.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import atomic_file
from qjax.io.gguf_types import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    MAGIC,
    MAX_DIMS,
    MAX_NAME,
    SCALAR_NUMBER,
    STRING,
    TENSOR_TYPES,
    VERSION,
)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor to come: its name, its shape in numpy's order (rows first), its ggml type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return TENSOR_TYPES[self.type].nbytes(math.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Everything about a file but its weights.

    Attributes:
      header: the bytes before the first tensor, padding included.
      offsets: name -> place of the tensor in the file.
      size: bytes of the finished file.
    """

    header: bytes
    offsets: Mapping[str, int]
    size: int


def layout(metadata: Mapping[str, Any], infos: Sequence[TensorInfo]) -> Layout:
    """The header of a file and where each tensor will lie.

    Args:
      metadata: key -> bool, int, float, str, numpy scalar (which fixes the type), or a sequence of one of these, or of
        such sequences. An int is stored as u32 (i32 if negative, 64 bits if it must be), a float as f32, an empty
        sequence as strings.
      infos: the tensors in the order they will come.

    Raises:
      UserError: a name that is too long or appears twice, an unknown type, more than 4 dims, a row that the type's
        block does not divide, or a value that GGUF cannot hold.
    """
    metadata = {k: v for k, v in metadata.items() if k != "general.alignment"}  # always the default here
    kv = b"".join(_string(key) + _value(key, value) for key, value in metadata.items())
    table: list[bytes] = []
    offsets: dict[str, int] = {}
    at = 0
    for info in infos:
        _check(info, offsets)
        dims = struct.pack(f"<{len(info.shape)}Q", *reversed(info.shape))
        kind = TENSOR_TYPES[info.type].id
        table.append(_string(info.name) + struct.pack("<I", len(info.shape)) + dims + struct.pack("<IQ", kind, at))
        offsets[info.name] = at
        at += _padded(info.nbytes)
    header = MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(metadata)) + kv + b"".join(table)
    header += b"\0" * (_padded(len(header)) - len(header))
    return Layout(header, {name: len(header) + o for name, o in offsets.items()}, len(header) + at)


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    infos: Sequence[TensorInfo],
    tensors: Iterable[np.ndarray | bytes],
) -> None:
    """Write a file atomically, one tensor in memory at a time.

    Args:
      path: the final name.
      metadata, infos: as for `layout`.
      tensors: the bytes of each tensor in the order of `infos`: bytes, or arrays whose memory is those bytes. An
        iterator is asked for one at a time.

    Raises:
      UserError: as `layout`; a tensor of the wrong size; a full disk. Nothing is left under the name then.
    """
    plan = layout(metadata, infos)
    with atomic_file(path) as f:
        f.write(plan.header)
        rest = iter(tensors)
        for info in infos:
            write_tensor(f, info, next(rest, b""))


def write_tensor(f: BinaryIO, info: TensorInfo, tensor: np.ndarray | bytes) -> None:
    """Write one tensor's bytes and their padding at the file's position."""
    raw = tensor if isinstance(tensor, bytes) else np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    if len(raw) != info.nbytes:
        raise UserError(
            f"tensor {info.name!r} ({info.type} {list(info.shape)}) takes {info.nbytes} bytes, got {len(raw)}"
        )
    f.write(raw)
    f.write(b"\0" * (_padded(len(raw)) - len(raw)))


def tensor_order(name: str) -> tuple[int, str]:
    """The sort key of llama-quantize: names outside the layers first, then layer by layer, by name within one.

    >>> sorted(["blk.10.a", "output.weight", "blk.2.b"], key=tensor_order)
    ['output.weight', 'blk.2.b', 'blk.10.a']
    """
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def _check(info: TensorInfo, seen: Mapping[str, int]) -> None:
    what = f"tensor {info.name!r}"
    if info.name in seen:
        raise UserError(f"{what} appears twice")
    if len(info.name.encode()) >= MAX_NAME:
        raise UserError(f"{what}: GGUF names have at most {MAX_NAME - 1} bytes")
    if info.type not in TENSOR_TYPES:
        raise UserError(f"{what}: {info.type} is not a GGUF type")
    if not 1 <= len(info.shape) <= MAX_DIMS or 0 in info.shape:
        raise UserError(f"{what}: GGUF tensors have 1 to {MAX_DIMS} dims, none of them 0, got {list(info.shape)}")
    block = TENSOR_TYPES[info.type].block
    if info.shape[-1] % block:
        raise UserError(f"{what}: {info.type} needs rows of a multiple of {block} weights, got {info.shape[-1]}")


def _padded(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError:
        raise UserError(f"GGUF stores UTF-8, which {text!r} has no form in") from None
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, list | tuple) and all(isinstance(v, list | tuple | np.ndarray) for v in value):
        return struct.pack("<IIQ", ARRAY, ARRAY, len(value)) + b"".join(_value(key, v)[4:] for v in value)
    array = np.asarray(value)
    if array.ndim > 1 or array.dtype.kind not in "biuf":
        raise UserError(f"GGUF key {key!r}: cannot store a value like {str(value)[:40]!r}")
    if not isinstance(value, np.ndarray | np.generic):  # a Python number: the smallest usual type
        array = array.astype(_usual(array))
    number = BOOL if array.dtype.kind == "b" else SCALAR_NUMBER.get(array.dtype.str.lstrip("<|"))
    if number is None:
        raise UserError(f"GGUF key {key!r}: no GGUF type for {array.dtype}")
    kind = struct.pack("<I", number) if array.ndim == 0 else struct.pack("<IIQ", ARRAY, number, array.size)
    return kind + array.tobytes()


def _usual(array: np.ndarray) -> np.dtype[Any]:
    if array.dtype.kind == "b":
        return array.dtype
    if array.dtype.kind == "f":
        return np.dtype("<f4")
    low, high = int(array.min()), int(array.max())
    # llama.cpp asks for arrays of i32 and for single numbers as u32.
    codes = ("<i4", "<u4", "<i8", "<u8") if array.ndim else ("<u4", "<i4", "<u8", "<i8")
    return next(np.dtype(c) for c in codes if np.iinfo(c).min <= low and high <= np.iinfo(c).max)
