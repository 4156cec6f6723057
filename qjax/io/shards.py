"""A folder's safetensors files, written tensor by tensor in any order, before it is known which there will be.

    room for the header | tensor | tensor | ...        ->  the header in its room, spaces behind it (the format allows)

A file that is full is closed and the next one begun; the index is written when all are known. Memory holds one tensor.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qjax.errors import UserError
from qjax.io.safetensors import DTYPE_NAMES, INDEX, SHARD_BYTES, SINGLE

_ENTRY = 160  # bytes of a header's entry beside the name, at most


class Shards:
    """Files of a folder that nobody reads yet."""

    def __init__(self, folder: Path, names: int, shard_bytes: int = SHARD_BYTES):
        """`names`: bytes of all tensors' names and 160 for each of them, at most: the room for a header."""
        self._folder, self._room, self._limit = folder, -(-names // 8) * 8 + 8, shard_bytes
        self._file: BinaryIO | None = None
        self._headers: list[dict[str, Any]] = []
        self._at = self._total = 0
        self._seen: set[str] = set()

    def put(self, name: str, array: np.ndarray) -> None:
        """Write a tensor. Raises UserError where the name has been written, or the type is none of safetensors'."""
        array = np.asarray(array, order="C")
        if name in self._seen or array.dtype not in DTYPE_NAMES:
            raise UserError(f"tensor {name!r} " + ("comes twice" if name in self._seen else f"is of {array.dtype}"))
        if self._file is None or (self._at and self._at + array.nbytes > self._limit):
            self._next()
        assert self._file is not None
        end = self._at + array.nbytes
        entry = {"dtype": DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [self._at, end]}
        self._headers[-1][name] = entry
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._seen.add(name)
        self._at, self._total = end, self._total + array.nbytes

    def close(self) -> None:
        """The last header, the files' names, and the index where there are several."""
        if self._file is None:
            self._next()
        self._finish()
        count = len(self._headers)
        if count == 1:
            (self._folder / "shard-1").rename(self._folder / SINGLE)
            return
        where: dict[str, str] = {}
        for i, header in enumerate(self._headers, 1):
            name = f"model-{i:05}-of-{count:05}.safetensors"
            (self._folder / f"shard-{i}").rename(self._folder / name)
            where |= dict.fromkeys(header, name)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(where.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _next(self) -> None:
        self._finish()
        self._headers.append({})
        self._file, self._at = open(self._folder / f"shard-{len(self._headers)}", "w+b"), 0  # noqa: SIM115
        self._file.seek(self._room)

    def _finish(self) -> None:
        if self._file is None:
            return
        text = json.dumps({"__metadata__": {"format": "pt"}} | self._headers[-1], separators=(",", ":")).encode()
        assert len(text) <= self._room - 8, "the room for the header was counted too small"
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room - 8) + text.ljust(self._room - 8))
        self._file.close()


def room(names: list[str], each: int) -> int:
    """Bytes for the header of at most `each` tensors for each name."""
    return 64 + each * sum(len(json.dumps(name)) + _ENTRY for name in names)
