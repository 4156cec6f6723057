"""FP8_E4M3 as checkpoints have it: bytes of 8-bit floats, a scale beside them.

W = scale float(code)        scale f32[out, 1], [1, 1], or of blocks of 128 x 128 (DeepSeek): [out / 128, in / 128]
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats import format as get_format
from qjax.tensor import QTensor

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_FORMATS = {"channel": "FP8_E4M3", "tensor": "FP8_E4M3_tensor"}
BLOCK = 128


def scope_of(format: Format) -> str | None:
    """What shares a scale, "channel" or "tensor"; None where the format is another."""
    return next((scope for scope, name in _FORMATS.items() if name == format.name), None)


def format_of(scope: str) -> Format:
    """The inverse of `scope_of`."""
    return get_format(_FORMATS[scope])


def as_e4m3(codes: np.ndarray) -> np.ndarray:
    """Bytes as the floats they are."""
    return codes.view(E4M3)


def numbers_of(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """f8[out, in] and f32[out, 1] or [1, 1] of a weight. Raises UserError behind a change of variables."""
    if q.applied:
        raise UserError("the weight lies behind a change of variables, which the layer would have to run")
    return as_e4m3(np.array(q.leaves["codes"])), np.array(q.leaves["scale"])


def qtensor(format: Format, codes: np.ndarray, scale: np.ndarray) -> QTensor:
    """The inverse of `numbers_of`; the scale of any float type."""
    scale = scale.astype(np.float32)
    if not np.isfinite(scale).all():
        raise UserError("its scales have NaN or infinite values; the file is broken")
    return QTensor({"codes": codes.view(np.uint8), "scale": scale.reshape(-1, 1)}, format)


def block_format() -> Format:
    """Of weights under a scale for each block of a row."""
    return get_format(f"FP8_E4M3_b{BLOCK}")


def of_blocks(codes: np.ndarray, scale: np.ndarray) -> QTensor:
    """Scales of blocks of 128 x 128 become those of each row in them: the same values.

    Args:
      codes: f8[out, in], in a multiple of 128.
      scale: f32[ceil(out / 128), in / 128].
    """
    rows = np.repeat(scale.astype(np.float32), BLOCK, axis=0)[: len(codes)]
    if not np.isfinite(rows).all():
        raise UserError("its scales have NaN or infinite values; the file is broken")
    return QTensor({"codes": codes.view(np.uint8), "scale": rows}, block_format())
