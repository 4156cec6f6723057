"""A packed model into a GGUF file with the very values it has, where a ggml type holds them.

    W = s (q - z), fp16 s        q - z in -8 .. 7: Q4_0        in -16 .. 15: Q5_0        in -127 .. 127: Q8_0

A group of several blocks gives each of them its scale. MXFP4, NVFP4 and what a GGUF file had go over as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import BlockFormat, Format
from qjax.formats import format as get_format
from qjax.io.exports.integers import in_ggml, integers_of, kind_of
from qjax.io.gguf_model import metadata_of, to_rows, usual_type
from qjax.io.gguf_types import DENSE, TENSOR_TYPES
from qjax.io.gguf_write import TensorInfo, tensor_order, write_gguf
from qjax.models.families import WeightName, rope_tensors, weight_names
from qjax.pipeline.encode import check_finite
from qjax.pipeline.report import Report, TensorReport
from qjax.pipeline.source import Source, open_source
from qjax.tensor import QTensor


def export_gguf(
    model: str | Path, out: str | Path, *, progress: Callable[[str, int, int], None] = lambda name, done, total: None
) -> Report:
    """Write a packed model as GGUF; floats of matrices stay what they are, vectors become F32.

    Args:
      model: a directory of another library's container, or a GGUF file.
      out: the file to write; it appears when it is whole.
      progress: called as (weight, weights done, of all).

    Raises:
      UserError: weights that no ggml type holds exactly, or none that are packed; what `open_source` raises. Nothing
        has the final name then.
    """
    source, out = open_source(model), Path(out)
    names = {w.gguf: w for w in weight_names(source.config)}
    rope = rope_tensors(source.config)
    infos = [TensorInfo(w.gguf, w.file_shape, _type(source, w)) for w in names.values()]
    infos += [TensorInfo(name, table.shape, "F32") for name, table in rope.items()]
    infos.sort(key=lambda info: tensor_order(info.name))
    if all(info.type in DENSE for info in infos):
        raise UserError(f"{source.path}: its weights are floats; `qjax quantize -o OUT.gguf` rounds them")
    if source.tokenizer is None:
        raise UserError(f"{source.path}: has no tokenizer, and llama.cpp loads no file without one")
    name = source.card.gguf.get("general.name") or out.stem
    meta = metadata_of(source.config, source.tokenizer, None, name, usual_type(infos), source.card.gguf)
    lines: list[TensorReport] = []

    def tensors() -> Iterator[np.ndarray]:
        for info in infos:
            yield rope[info.name] if info.name in rope else to_rows(names[info.name], _leaf(info), info.type)
            kept = "a vector" if info.type in DENSE else None
            lines.append(TensorReport(info.name, info.shape, info.type, info.nbytes, None, kept))
            progress(info.name, len(lines), len(infos))

    def _leaf(info: TensorInfo) -> Any:
        w = names[info.name]
        q = source.packed(w)
        if q is None:
            leaf = source.leaf(w)
            check_finite({info.name: leaf})
            return leaf
        if q.applied:
            raise UserError(
                f"{w.hf}: lies behind {type(q.applied[0]).__name__}, and GGUF has no place for that; re-quantize it: "
                f"qjax quantize {source.path} -o OUT.gguf --type Q4_K_M --requantize"
            )
        return q if q.format.name == info.type else _converted(q, info)

    write_gguf(out, meta, infos, tensors())
    return Report(tuple(lines))


def ggml_type(format: Format) -> str:
    """The ggml type that holds a format's values. Raises UserError where there is none."""
    if isinstance(format, BlockFormat) and format.name in TENSOR_TYPES:
        return format.name
    kind = kind_of(format)
    reach = 2 ** (kind.bits - 1) if kind.symmetric else 2**kind.bits - 1
    for name, most in (("Q4_0", 8 if kind.symmetric else 7), ("Q5_0", 16 if kind.symmetric else 15), ("Q8_0", 128)):
        if reach <= most and not (kind.group and kind.group % get_format(name).block):
            return name
    raise UserError(f"no ggml type holds {format.name} exactly")


def _type(source: Source, w: WeightName) -> str:
    kind = source.type_of(w)
    if kind in DENSE:
        return "F32" if w.stays_float or kind not in ("F16", "BF16") else kind
    try:
        return ggml_type(get_format(kind))
    except UserError as e:
        raise UserError(
            f"{w.hf}: {e}; re-quantize it: qjax quantize {source.path} -o OUT.gguf --type Q4_K_M --requantize"
        ) from None


def _converted(q: QTensor, info: TensorInfo) -> QTensor:
    format = get_format(info.type)
    parts = [QTensor({k: leaf[i] for k, leaf in q.leaves.items()}, q.format) for i in range(q.shape[0])] if q.ndim > 2 \
        else [q]  # fmt: skip
    try:
        made = [in_ggml(integers_of(part), format) for part in parts]  # type: ignore[arg-type]
    except UserError as e:
        raise UserError(
            f"{info.name}: {e}; re-quantize it: qjax quantize MODEL -o OUT.gguf --type Q4_K_M --requantize"
        ) from None
    if q.ndim == 2:
        return made[0]
    return QTensor({"blocks": np.stack([np.asarray(m.leaves["blocks"]) for m in made])}, format)
