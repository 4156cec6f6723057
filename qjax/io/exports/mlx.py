"""MLX checkpoints, as mlx-lm converts and reads them: affine 2, 3, 4, 5, 6 and 8 bits, MXFP4, NVFP4.

    weight u32[out, in b / 32]    codes, a little-endian bit stream along `in`
    affine    scales, biases [out, G] of one float type            W = s q + m
    mxfp4     scales u8[out, in / 32], E8M0        nvfp4    scales u8[out, in / 16], E4M3

Embeddings and heads are packed too. Integers with zeros have m = -s z where that is exact in the scales' type, else
both become f32. config.json says group_size, bits and mode for all, and by module where one differs. Sources:
mlx.core.quantize, mlx-lm.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.formats.grid import Grid
from qjax.formats.offset import ScaleAndBias, scale_and_bias
from qjax.io.exports import fp4
from qjax.io.exports.container import Members, Settings, joined, members, number_of, said_of
from qjax.io.exports.integers import KINDS, SCALES, codes_of, integers_of, kind_of, packed, unpacked, words
from qjax.io.safetensors import DTYPE_NAMES, FLOATS, Checkpoint
from qjax.tensor import QTensor

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_FP4 = {"MXFP4": ("mxfp4", 32), "NVFP4": ("nvfp4", 16)}
_RANGED = ("Q4_1", "Q5_1")  # ggml's types of scale and minimum


@dataclasses.dataclass(frozen=True)
class MLX:
    """See the module's docstring."""

    name: str = "mlx"
    about: str = "mlx-lm: int, uint and uint_m of 2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128; MXFP4; NVFP4"
    everything: bool = True

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        if format.name in _FP4:
            return
        bits, group = _affine(format)
        if bits not in BITS or group not in GROUPS:
            raise UserError(f"mlx holds 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, not {format.name}; take "
                            "uint4_g64_m, int4_g32 ...")  # fmt: skip

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        if q.format.name in _FP4:
            codes, scale = fp4.numbers_of(q)
            return {".weight": codes.view("<u4"), ".scales": scale}
        bits, _ = _affine(q.format)
        if _is_ranged(q.format):
            if q.applied:
                raise UserError("the weight lies behind a change of variables, which the layer would have to run")
            assert isinstance(q.format, Grid) and q.format.scaling.offset is not None
            scales, codes = unpacked(q.leaves, q.format)
            s, m = (np.asarray(store.get(scales)) for store in (q.format.scaling.scale, q.format.scaling.offset))
            kind, codes = SCALES[str(q.format.scaling.scale.kind)], np.asarray(codes)  # type: ignore[attr-defined]
        else:
            w = integers_of(q)
            s, codes, kind = w.scale.astype(np.float32), w.codes, SCALES[w.kind.scale]
            m = -(s * w.zero)
            kind = kind if (m.astype(kind).astype(np.float32) == m).all() else SCALES["f32"]
        return {".weight": words(codes, bits).view("<u4"), ".scales": s.astype(kind), ".biases": m.astype(kind)}

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        by_module = {module: _mode(f) for module, f in packed.items()}
        usual = Counter(tuple(mode.items()) for mode in by_module.values()).most_common(1)[0][0]
        said = dict(usual) | {module: mode for module, mode in by_module.items() if tuple(mode.items()) != usual}
        return {"quantization": said, "quantization_config": said}

    def reads(self, config: Settings) -> bool:
        said = said_of(config)
        return "quant_method" not in said and "bits" in said and "group_size" in said

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        said = said_of(config)
        formats: dict[str, Format] = {}

        def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
            own = said.get(m.module)
            shape, formats[m.module] = _read(m, {**said, **own} if isinstance(own, dict) else said)
            return shape, formats[m.module]

        found = members(checkpoint, ".scales", (".weight",), (".biases",))
        return joined(checkpoint, found, shape_of, lambda m, a: _put(formats[m.module], a))


def _is_ranged(format: Format) -> bool:
    return format.name in _RANGED or (isinstance(format, Grid) and isinstance(format.scaling, ScaleAndBias))


def _affine(format: Format) -> tuple[int, int]:
    """Bits and group of a format that is affine. Raises UserError where it is not."""
    if _is_ranged(format):
        assert isinstance(format, Grid)
        return format.levels.bits, format.block  # type: ignore[attr-defined]
    kind = kind_of(format)
    return kind.bits, kind.group


def _mode(format: Format) -> dict[str, Any]:
    if format.name in _FP4:
        mode, group = _FP4[format.name]
        return {"group_size": group, "bits": 4, "mode": mode}
    bits, group = _affine(format)
    return {"group_size": group, "bits": bits, "mode": "affine"}


def _read(m: Members, said: Settings) -> tuple[tuple[int, ...], Format]:
    path, mode = m.tensors[".weight"].path, said.get("mode", "affine")
    bits, group = number_of(path, said, "bits", BITS), number_of(path, said, "group_size", (16, *GROUPS))
    out, size = m.matrix(".weight", "U32")
    for type, fixed in _FP4.items():
        if (mode, group) == fixed and bits == 4:
            m.shaped(".scales", "U8", (out, 8 * size // group))
            return (out, 8 * size), fp4.format_of(type, (out, 8 * size))
    if mode != "affine" or group not in GROUPS:
        raise UserError(f"{path}: {m.module!r}: {mode} in groups of {group} is not read; affine, mxfp4 and nvfp4 are")
    columns = 32 * size // bits
    if columns % group:
        raise UserError(f"{path}: {m.module!r}: rows of {columns} weights are no multiple of their group of {group}")
    if ".biases" not in m.tensors:
        raise UserError(f"{path}: tensor {m.module + '.biases'!r} is missing")
    scale = m.shaped(".scales", [DTYPE_NAMES[d] for d in SCALES.values()], (out, columns // group))
    m.shaped(".biases", scale.dtype, scale.shape)
    return (out, columns), scale_and_bias(bits, group, KINDS[FLOATS[scale.dtype]])


def _put(format: Format, a: dict[str, np.ndarray]) -> QTensor:
    if format.name in _FP4:
        return fp4.qtensor(format, a[".weight"].view(np.uint8), a[".scales"])
    assert isinstance(format, Grid) and isinstance(format.scaling, ScaleAndBias)
    bits = _affine(format)[0]
    codes = codes_of(a[".weight"], bits, 32 * a[".weight"].shape[-1] // bits)
    scales = {"scale": a[".scales"].astype(np.float32), "bias": a[".biases"].astype(np.float32)}
    if not all(np.isfinite(x).all() for x in scales.values()):
        raise UserError("its scales or biases have NaN or infinite values; the file is broken")
    return QTensor(packed(scales, codes, format), format)
