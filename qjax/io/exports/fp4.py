"""MXFP4 and NVFP4 as checkpoints have them: two weights a byte, the even one in the low nibble, scales beside them.

    ggml     scale byte(s) | 16 (8) bytes: weight j low, j + 16 (j + 8) high        here     codes u8[out, in / 2]
                                                                                             scale u8[out, in / 32 | 16]

Scale bytes and codes are the same; only their places differ. NVFP4's blocks of 64 have four scales.
"""

from __future__ import annotations

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.tensor import QTensor, check_length

_PARTS = {"MXFP4": (1, 32), "NVFP4": (4, 16)}  # scales of a block, weights of each


def format_of(type: str, shape: tuple[int, ...]) -> Format:
    """The ggml type. Raises UserError where rows are no multiple of its block."""
    format = get_format(type)
    check_length(format, shape[-1], f"shape {shape}")
    return format


def numbers_of(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes u8[*b, n / 2] and scale bytes u8[*b, n / 32 or n / 16]. Raises UserError behind a change of variables."""
    if q.applied:
        raise UserError("the weight lies behind a change of variables, which the layer would have to run")
    blocks = np.asarray(q.leaves["blocks"])
    scales, group = _PARTS[q.format.name]
    lead = blocks.shape[:-2]
    halves = blocks[..., scales:].reshape(*lead, -1, group // 2)
    codes = np.concatenate([halves & 15, halves >> 4], axis=-1)
    return np.ascontiguousarray(codes[..., 0::2] | codes[..., 1::2] << 4).reshape(*lead, -1), np.ascontiguousarray(
        blocks[..., :scales]
    ).reshape(*lead, -1)


def qtensor(format: Format, codes: np.ndarray, scale: np.ndarray) -> QTensor:
    """The inverse of `numbers_of`. Raises UserError of a scale byte that is no number."""
    if (scale == 0xFF).any() or (format.name == "NVFP4" and (scale > 0x7E).any()):
        raise UserError(f"its scales have bytes that are no positive number of {format.name}; the file is broken")
    scales, group = _PARTS[format.name]
    lead = codes.shape[:-1]
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*lead, -1, group)
    halves = (pairs[..., : group // 2] | pairs[..., group // 2 :] << 4).reshape(*lead, -1, scales * group // 2)
    blocks = np.concatenate([scale.reshape(*lead, -1, scales), halves], axis=-1)
    return QTensor({"blocks": blocks}, format)
