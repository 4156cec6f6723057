"""How compressed-tensors stores a weight, scheme by scheme; its configs are compressed_tensors.py.

    pack-quantized          weight_packed i32[out, ceil(in b / 32)]   codes, little-endian along `in`
                            weight_scale [out, G]                     weight_shape i64[2]
                            weight_zero_point i32[ceil(out b / 32), G]   along `out`, asymmetric formats only
    float-quantized         weight f8[out, in]        weight_scale [out, 1] or [1]
    int-quantized           weight i8[out, in]        weight_scale [out, 1]
    mxfp4-pack-quantized    weight_packed u8[out, in / 2], the even weight in the low nibble     weight_scale u8, E8M0
    nvfp4-pack-quantized    the same, weight_scale f8[out, in / 16], weight_global_scale f32[1]: W = T s / global

Signed codes are stored with 2^(b - 1) added. The stream is that of compressed-tensors 0.18 and later; before, three-
bit codes did not straddle words. NVFP4 is written with a global scale of 1, ggml's own; another one is read as a scale
of all inputs, W = (T s) / global, and written back.

Source: the compressors of the compressed-tensors package.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.exports import fp4, fp8
from qjax.io.exports.container import Members, Settings, number_of
from qjax.io.exports.integers import KINDS, SCALES, Kind, codes_of, integers_of, kind_of, whole, words
from qjax.io.safetensors import DTYPE_NAMES, FLOATS
from qjax.reparam.scale import Scaled
from qjax.tensor import QTensor

_SCALES = tuple(DTYPE_NAMES[dtype] for dtype in SCALES.values())


@runtime_checkable
class Scheme(Protocol):
    """One way to store a weight."""

    @property
    def format(self) -> str:
        """What the config calls it."""

    @property
    def key(self) -> str:
        """See `members`."""

    @property
    def beside(self) -> tuple[str, ...]:
        """See `members`."""

    @property
    def maybe(self) -> tuple[str, ...]:
        """See `members`."""

    def args(self, format: Format) -> dict[str, Any] | None:
        """What the config says of the weights; None where it does not store this format."""

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        """See `Container`."""

    def shape_of(self, m: Members, args: Settings) -> tuple[tuple[int, ...], Format]:
        """See `joined`."""

    def put(self, format: Format, a: dict[str, np.ndarray]) -> QTensor:
        """See `joined`."""


def _args(bits: int, type: str, strategy: str, group: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    return {
        "num_bits": bits, "type": type, "symmetric": symmetric, "strategy": strategy, "group_size": group,
        "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Packed:
    """Integers of 2 to 8 bits."""

    format: str = "pack-quantized"
    key: str = ".weight_packed"
    beside: tuple[str, ...] = (".weight_scale", ".weight_shape")
    maybe: tuple[str, ...] = (".weight_zero_point", ".weight_g_idx")

    def args(self, format: Format) -> dict[str, Any] | None:
        try:
            kind = kind_of(format)
        except UserError:
            return None
        return _args(kind.bits, "int", "group" if kind.group else "channel", kind.group or None, kind.symmetric)

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        w = integers_of(q)
        made = {
            ".weight_packed": words(w.codes, w.kind.bits),
            ".weight_scale": w.scale,
            ".weight_shape": np.asarray(w.codes.shape, np.int64),
        }
        if not w.kind.symmetric:
            made[".weight_zero_point"] = np.ascontiguousarray(words(w.zero.T, w.kind.bits).T)
        return made

    def shape_of(self, m: Members, args: Settings) -> tuple[tuple[int, ...], Format]:
        path = m.tensors[self.key].path
        bits = number_of(path, args, "num_bits", (2, 3, 4, 5, 6, 7, 8))
        group = max(number_of(path, {"group_size": args.get("group_size") or 0}, "group_size", range(-1, 1 << 24)), 0)
        if args.get("type", "int") != "int":
            raise UserError(f"{m.module}: packed codes of type {args['type']!r} are not read; int is")
        if ".weight_g_idx" in m.tensors:
            raise UserError(f"{m.module}: weight_g_idx, columns out of order, is deprecated and not read")
        m.shaped(".weight_shape", "I64", (2,))
        (out, size), (_, groups) = m.matrix(self.key, "I32"), m.matrix(".weight_scale", _SCALES)
        scale = m.shaped(".weight_scale", _SCALES, (out, groups))
        rows, columns = map(int, m.array(".weight_shape"))
        fit = groups * group == columns if group else groups == 1
        if rows != out or not fit or size != -(-columns * bits // 32):
            said = f"weight_shape {[rows, columns]} in {groups} groups of {group or 'a row'} takes others"
            raise UserError(f"{path}: tensor {m.module + self.key!r} has {out} rows of {size} words; {said}")
        symmetric = bool(args.get("symmetric", True))
        if not symmetric:
            if ".weight_zero_point" not in m.tensors:
                raise UserError(f"{path}: tensor {m.module + '.weight_zero_point'!r} is missing")
            m.shaped(".weight_zero_point", "I32", (-(-out * bits // 32), groups))
        kind = Kind(bits, group, symmetric, KINDS[FLOATS[scale.dtype]])
        return (out, columns), kind.format

    def put(self, format: Format, a: dict[str, np.ndarray]) -> QTensor:
        kind, (out, columns) = kind_of(format), a[".weight_shape"].tolist()
        zero = None
        if not kind.symmetric:
            zero = np.ascontiguousarray(codes_of(a[".weight_zero_point"].T, kind.bits, out).T)
        return whole(kind, codes_of(a[self.key], kind.bits, columns), a[".weight_scale"], zero).qtensor


@dataclasses.dataclass(frozen=True)
class Int8:
    """Bytes with a scale a row, which meet rounded inputs."""

    format: str = "int-quantized"
    key: str = ".weight_scale"
    beside: tuple[str, ...] = (".weight",)
    maybe: tuple[str, ...] = ()

    def args(self, format: Format) -> dict[str, Any] | None:
        args = Packed().args(format)
        rows = args is not None and args["num_bits"] == 8 and args["strategy"] == "channel" and args["symmetric"]
        return args if rows else None

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        w = integers_of(q)
        return {".weight": (w.codes - np.uint8(128)).view(np.int8), ".weight_scale": w.scale}

    def shape_of(self, m: Members, args: Settings) -> tuple[tuple[int, ...], Format]:
        shape, strategy = m.matrix(".weight", "I8"), args.get("strategy")
        if strategy != "channel" or not args.get("symmetric", True):
            raise UserError(f"{m.module}: int8 weights of strategy {strategy!r} are not read; symmetric channels are")
        scale = m.shaped(".weight_scale", _SCALES, (shape[0], 1))
        return shape, Kind(8, 0, True, KINDS[FLOATS[scale.dtype]]).format

    def put(self, format: Format, a: dict[str, np.ndarray]) -> QTensor:
        codes = a[".weight"].view(np.uint8) + np.uint8(128)
        return whole(kind_of(format), codes, a[".weight_scale"]).qtensor


@dataclasses.dataclass(frozen=True)
class Float8:
    """8-bit floats with a scale a row or a matrix."""

    format: str = "float-quantized"
    key: str = ".weight_scale"
    beside: tuple[str, ...] = (".weight",)
    maybe: tuple[str, ...] = ()

    def args(self, format: Format) -> dict[str, Any] | None:
        scope = fp8.scope_of(format)
        return None if scope is None else _args(8, "float", scope)

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        codes, scale = fp8.numbers_of(q)
        return {".weight": codes, ".weight_scale": scale.reshape(-1) if scale.size == 1 else scale}

    def shape_of(self, m: Members, args: Settings) -> tuple[tuple[int, ...], Format]:
        shape, strategy = m.matrix(".weight", "F8_E4M3"), args.get("strategy")
        if strategy not in ("channel", "tensor"):
            raise UserError(f"{m.module}: FP8 with the strategy {strategy!r} is not read; channel and tensor are")
        scale = (shape[0], 1) if strategy == "channel" else (1,)
        m.shaped(".weight_scale", ("F32", "BF16", "F16"), scale)
        return shape, fp8.format_of(strategy)

    def put(self, format: Format, a: dict[str, np.ndarray]) -> QTensor:
        return fp8.qtensor(format, a[".weight"], a[".weight_scale"])


@dataclasses.dataclass(frozen=True)
class Float4:
    """MXFP4 or NVFP4."""

    type: str
    format: str
    beside: tuple[str, ...]
    key: str = ".weight_packed"
    maybe: tuple[str, ...] = ()

    def args(self, format: Format) -> dict[str, Any] | None:
        if format.name != self.type:
            return None
        if self.type == "MXFP4":
            return _args(4, "float", "group", 32) | {"scale_dtype": "torch.uint8"}
        return _args(4, "float", "tensor_group", 16) | {"scale_dtype": "torch.float8_e4m3fn"}

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        if self.type == "MXFP4":
            codes, scale = fp4.numbers_of(q)
            return {".weight_packed": codes, ".weight_scale": scale}
        shared = np.ones(1, np.float32)
        if len(q.applied) == 1 and isinstance(q.applied[0], Scaled):
            shared, q = np.unique(np.asarray(q.applied[0].s)), dataclasses.replace(q, applied=())
        if shared.size > 1:
            raise UserError("NVFP4 has one global scale, and this weight lies behind channel scales")
        codes, scale = fp4.numbers_of(q)
        return {".weight_packed": codes, ".weight_scale": fp8.as_e4m3(scale), ".weight_global_scale": shared}

    def shape_of(self, m: Members, args: Settings) -> tuple[tuple[int, ...], Format]:
        out, half = m.matrix(self.key, "U8")
        if self.type == "MXFP4":
            m.shaped(".weight_scale", "U8", (out, half // 16))
        else:
            m.shaped(".weight_scale", "F8_E4M3", (out, half // 8))
            m.shaped(".weight_global_scale", "F32", (1,))
        return (out, 2 * half), fp4.format_of(self.type, (out, 2 * half))

    def put(self, format: Format, a: dict[str, np.ndarray]) -> QTensor:
        q = fp4.qtensor(format, a[self.key], a[".weight_scale"].view(np.uint8))
        shared = a.get(".weight_global_scale", np.ones(1, np.float32))
        if not (np.isfinite(shared).all() and (shared > 0).all()):
            raise UserError("its global scale is no positive number; the file is broken")
        return q if shared == 1 else dataclasses.replace(q, applied=(Scaled(np.full(q.shape[1], shared)),))


ALONE: tuple[Scheme, ...] = (
    Packed(),
    Float8(),
    Float4("MXFP4", "mxfp4-pack-quantized", (".weight_scale",)),
    Float4("NVFP4", "nvfp4-pack-quantized", (".weight_scale", ".weight_global_scale")),
)
"""Those of weights alone."""
WITH_INPUTS: tuple[Scheme, ...] = (Int8(), Float8())
"""Those of weights that meet inputs of 8 bits."""
SCHEMES: tuple[Scheme, ...] = (*ALONE, Int8())
"""All that are read."""
