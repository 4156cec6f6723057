"""The real ggml as a judge: quantize and dequantize rows by calling libggml-base through ctypes."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import gguf
import numpy as np


class Ggml:
    """`quantize` runs ggml_quantize_chunk, `dequantize` the type's dequantize_row."""

    def __init__(self, folder: str | Path):
        lib = ctypes.CDLL(str(Path(folder) / "libggml-base.so"))
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            *[ctypes.c_int64] * 3,
            ctypes.c_void_p,
        ]
        lib.ggml_row_size.restype = ctypes.c_size_t
        lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self.lib = lib

    def type(self, name: str) -> int:
        """The number of a type; Q2_0 is younger than gguf-py."""
        return 42 if name == "Q2_0" else int(gguf.GGMLQuantizationType[name])

    def quantize(self, name: str, w: np.ndarray, importance: np.ndarray | None = None) -> bytes:
        """The bytes of w f32[..., n]; importance f32[n] is the imatrix row, one number per column."""
        w = np.ascontiguousarray(w, np.float32)
        rows, n = math.prod(w.shape[:-1]), w.shape[-1]
        type_ = self.type(name)
        dst = np.zeros(rows * self.lib.ggml_row_size(type_, n), np.uint8)
        im = None
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            assert importance.shape == (n,), importance.shape
            im = importance.ctypes.data
        elif self.lib.ggml_quantize_requires_imatrix(ctypes.c_int(type_)):
            raise ValueError(f"ggml refuses {name} without importance")
        size = self.lib.ggml_quantize_chunk(type_, w.ctypes.data, dst.ctypes.data, 0, rows, n, im)
        assert size == dst.size, (size, dst.size)
        return dst.tobytes()

    def dequantize(self, name: str, raw: bytes | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """f32 of `shape` (contracted axis last) from a tensor's bytes."""
        raw = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else raw
        raw = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
        if name == "F32":
            return raw.view(np.float32).reshape(shape).copy()
        rows, n = math.prod(shape[:-1]), shape[-1]
        assert raw.size == rows * self.lib.ggml_row_size(self.type(name), n), (raw.size, shape)
        symbol = {"F16": "ggml_fp16_to_fp32_row", "BF16": "ggml_bf16_to_fp32_row"}.get(name)
        symbol = symbol or f"dequantize_row_{name[:-2].lower() + '_K' if name.endswith('_K') else name.lower()}"
        out = np.empty(rows * n, np.float32)
        getattr(self.lib, symbol)(
            ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(rows * n)
        )
        return out.reshape(shape)
