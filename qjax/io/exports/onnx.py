"""ONNX Runtime's MatMulNBits: 2, 4 or 8 bits in blocks of 16, 32, 64 ... weights.

    weight_Q u8[out, G, block b / 8]    weight_scales f32[out, G]    weight_zeros u8[out, ceil(G b / 8)]
    W = s (q - z), z = 2^(b - 1) without zeros; codes and zeros are little-endian bit streams

The tensors are initializers of model.onnx (io/onnx_graph.py) and lie in model.onnx.data, which io/onnx_file.py writes
and reads. Source: ContribOperators.md of ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.exports.container import Members, Settings, joined, members, number_of, one_format, said_of
from qjax.io.exports.integers import Kind, integers_of, kind_of, packed_bytes_of, unpacked_bytes, whole
from qjax.io.safetensors import Checkpoint
from qjax.tensor import QTensor

CODES, SCALES, ZEROS = ".weight_Q", ".weight_scales", ".weight_zeros"
BITS = (2, 4, 8)
_METHOD = "onnx_matmul_n_bits"


@dataclasses.dataclass(frozen=True)
class MatMulNBits:
    """See the module's docstring."""

    name: str = "onnx"
    about: str = "ONNX Runtime: 2, 4, 8 bits of int or uint in groups of a power of two, 16 and up"
    everything: bool = False

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        kind = kind_of(format)
        if kind.bits not in BITS or kind.group < 16 or kind.group & (kind.group - 1):
            raise UserError(
                f"onnx holds 2, 4 or 8 bits in groups of a power of two, 16 and up, not {format.name}; take int4_g32, "
                "uint8_g64 ..."
            )

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        w = integers_of(q)
        out, groups = w.scale.shape
        made = {
            CODES: packed_bytes_of(w.codes, w.kind.bits).reshape(out, groups, -1),
            SCALES: w.scale.astype(np.float32),
        }
        return made if w.kind.symmetric else made | {ZEROS: packed_bytes_of(w.zero, w.kind.bits)}

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        kind = kind_of(one_format(packed, self.name))
        said = {"quant_method": _METHOD, "bits": kind.bits, "block_size": kind.group, "symmetric": kind.symmetric}
        return {"quantization_config": said}

    def reads(self, config: Settings) -> bool:
        return said_of(config).get("quant_method") == _METHOD

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        said = said_of(config)
        bits = number_of(checkpoint.path, said, "bits", BITS)
        group = number_of(checkpoint.path, said, "block_size", range(16, 1 << 20))
        kind = Kind(bits, group, said.get("symmetric") is True, "f32")

        def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
            out, groups = m.matrix(SCALES, "F32")
            m.shaped(CODES, "U8", (out, groups, group * bits // 8))
            if not kind.symmetric:
                m.shaped(ZEROS, "U8", (out, -(-groups * bits // 8)))
            return (out, groups * group), kind.format

        def put(m: Members, a: dict[str, np.ndarray]) -> QTensor:
            out, groups = a[SCALES].shape
            codes = unpacked_bytes(a[CODES].reshape(out, -1), bits, groups * group)
            zero = None if kind.symmetric else unpacked_bytes(a[ZEROS], bits, groups)
            return whole(kind, codes, a[SCALES], zero).qtensor

        beside = (SCALES,) if kind.symmetric else (SCALES, ZEROS)
        return joined(checkpoint, members(checkpoint, CODES, beside), shape_of, put)
