"""The numbers a GGUF file uses for its types, and the sizes behind them.

    bytes of a row of n weights  =  n / block * block_bytes

Source: ggml.h and ggml-common.h of ggml 0.25 (`enum ggml_type`), the GGUF specification (`gguf_metadata_value_type`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME = 64  # bytes of a tensor's name; llama.cpp keeps a zero behind it


@dataclasses.dataclass(frozen=True)
class TensorType:
    """One ggml type: its name and number, weights a block, bytes a block."""

    name: str
    id: int
    block: int
    block_bytes: int

    def nbytes(self, count: int) -> int:
        """Bytes of `count` weights, a multiple of the block."""
        return count // self.block * self.block_bytes


_ROWS = """
F32 0 1 4, F16 1 1 2, BF16 30 1 2, F64 28 1 8, I8 24 1 1, I16 25 1 2, I32 26 1 4, I64 27 1 8,
Q4_0 2 32 18, Q4_1 3 32 20, Q5_0 6 32 22, Q5_1 7 32 24, Q8_0 8 32 34, Q8_1 9 32 36,
Q2_K 10 256 84, Q3_K 11 256 110, Q4_K 12 256 144, Q5_K 13 256 176, Q6_K 14 256 210, Q8_K 15 256 292,
IQ2_XXS 16 256 66, IQ2_XS 17 256 74, IQ3_XXS 18 256 98, IQ1_S 19 256 50, IQ4_NL 20 32 18, IQ3_S 21 256 110,
IQ2_S 22 256 82, IQ4_XS 23 256 136, IQ1_M 29 256 56, TQ1_0 34 256 54, TQ2_0 35 256 66,
MXFP4 39 32 17, NVFP4 40 64 36, Q1_0 41 128 18, Q2_0 42 64 18
"""


def _parse(row: str) -> TensorType:
    name, *numbers = row.split()
    return TensorType(name, *map(int, numbers))


TENSOR_TYPES: Mapping[str, TensorType] = MappingProxyType(
    {t.name: t for t in map(_parse, _ROWS.replace("\n", " ").strip().split(","))}
)
TENSOR_TYPE_OF_ID: Mapping[int, TensorType] = MappingProxyType({t.id: t for t in TENSOR_TYPES.values()})

# The types that are plain arrays.
DENSE: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F64": np.dtype("<f8"),
        "I8": np.dtype("i1"),
        "I16": np.dtype("<i2"),
        "I32": np.dtype("<i4"),
        "I64": np.dtype("<i8"),
    }
)

# Metadata values: number -> fixed-size scalar. 7 is BOOL (one byte), 8 STRING, 9 ARRAY.
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {
        i: np.dtype(f"<{code}")
        for i, code in {
            0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", BOOL: "u1", 10: "u8", 11: "i8", 12: "f8"
        }.items()
    }
)  # fmt: skip
SCALAR_NUMBER: Mapping[str, int] = MappingProxyType({d.str.lstrip("<|"): i for i, d in SCALARS.items() if i != BOOL})
