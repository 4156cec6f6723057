"""model.onnx and model.onnx.data: a graph, and beside it the tensors it names, written and read one at a time.

    model.onnx         the graph (onnx_graph.py); each initializer says location, offset and length of its bytes
    model.onnx.data    those bytes, each tensor from a multiple of 64 on

Read are files of this kind, with all tensors outside. The package onnx is wanted for both: pip install 'qjax[onnx]'.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.onnx_graph import check_graph, graph_of
from qjax.io.safetensors import DTYPES, INDEX, SINGLE, Checkpoint, Stored
from qjax.models.config import DecoderConfig

ONNX = "onnx"
_MODEL, _DATA, _ALIGN = "model.onnx", "model.onnx.data", 64


def package() -> Any:
    """The package onnx. Raises UserError where it is not installed."""
    try:
        return importlib.import_module("onnx")
    except ImportError:
        raise UserError("ONNX files want the package onnx: pip install 'qjax[onnx]'") from None


class OnnxFile:
    """The two files of a folder that nobody reads yet."""

    def __init__(self, folder: Path, config: DecoderConfig):
        """Raises UserError where there is no graph of such a decoder, or no package onnx."""
        check_graph(config)
        self._onnx, self._folder, self._config = package(), folder, config
        self._file = open(folder / _DATA, "w+b")  # noqa: SIM115
        self._tensors: dict[str, Any] = {}

    def put(self, name: str, array: np.ndarray) -> None:
        """Write a tensor; float16 and bfloat16 become float32, which the graph computes in."""
        array = np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(np.float32))
        self._file.write(b"\0" * (-self._file.tell() % _ALIGN))
        kind = self._onnx.TensorProto.UINT8 if array.dtype == np.uint8 else self._onnx.TensorProto.FLOAT
        made = self._onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
        made.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in (("location", _DATA), ("offset", self._file.tell()), ("length", array.nbytes)):
            made.external_data.add(key=key, value=str(value))
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._tensors[name] = made

    def close(self) -> None:
        """The graph."""
        self._file.close()
        model = graph_of(self._onnx, self._config, self._tensors)
        (self._folder / _MODEL).write_bytes(model.SerializeToString())


def is_onnx(folder: Path) -> bool:
    """Whether a folder's weights are in model.onnx."""
    return (folder / _MODEL).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


def open_onnx(folder: Path) -> Checkpoint:
    """The tensors of a folder's model.onnx; none is read.

    Raises:
      UserError: no package onnx; no readable graph; a tensor that does not lie in model.onnx.data, or is of another
        size there.
    """
    onnx, path, data = package(), folder / _MODEL, folder / _DATA
    try:
        model = onnx.load(str(path), load_external_data=False)
        size = data.stat().st_size
    except Exception as e:  # protobuf's own, of whatever kind
        raise UserError(f"{path}: no readable ONNX file with its {_DATA}: {' '.join(str(e).split())}") from None
    kinds = {onnx.TensorProto.UINT8: "U8", onnx.TensorProto.FLOAT: "F32"}
    tensors = {}
    for t in model.graph.initializer:
        where = {entry.key: entry.value for entry in t.external_data}
        if not where:
            continue  # a constant of the graph
        shape, dtype = tuple(t.dims), kinds.get(t.data_type)
        place = where.get("offset", "0"), where.get("length", "")
        if dtype is None or where.get("location") != _DATA or not all(n.isascii() and n.isdigit() for n in place):
            raise UserError(f"{path}: tensor {t.name!r} is no float32 or uint8 tensor in {_DATA}")
        offset, nbytes = map(int, place)
        if nbytes != math.prod(shape) * DTYPES[dtype].itemsize or offset + nbytes > size:
            raise UserError(f"{path}: tensor {t.name!r} of shape {list(shape)} does not lie in {_DATA} whole")
        tensors[t.name] = Stored(data, dtype, shape, offset, nbytes)
    return Checkpoint(folder, tensors)
