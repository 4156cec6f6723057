"""AWQ checkpoints of the GEMM kind: 4 bits.

    qweight i32[in, out / 8]    qzeros i32[G, out / 8]    scales f16[G, out]      W = s (q - z)

Eight codes along `out` share a word, code i of them in nibble 0 4 1 5 2 6 3 7 [i]. Sources: AWQ, arXiv:2306.00978;
AutoAWQ's packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.exports.container import Members, Settings, joined, members, number_of, one_format, said_of
from qjax.io.exports.integers import Kind, codes_of, integers_of, kind_of, whole, words
from qjax.io.safetensors import Checkpoint
from qjax.tensor import QTensor

_NIBBLE = np.array([0, 4, 1, 5, 2, 6, 3, 7])


def nibbles(codes: np.ndarray) -> np.ndarray:
    """u8[*b, out] -> i32[*b, out / 8]."""
    eights = codes.reshape(*codes.shape[:-1], -1, 8)[..., np.argsort(_NIBBLE)]
    return words(eights.reshape(codes.shape), 4)


def of_nibbles(packed: np.ndarray) -> np.ndarray:
    """The inverse of `nibbles`."""
    out = 8 * packed.shape[-1]
    return codes_of(packed, 4, out).reshape(*packed.shape[:-1], -1, 8)[..., _NIBBLE].reshape(*packed.shape[:-1], out)


@dataclasses.dataclass(frozen=True)
class AWQ:
    """See the module's docstring."""

    name: str = "awq"
    about: str = "AutoAWQ's GEMM kind, vLLM, transformers: 4 bits of int or uint, f16 scales, groups"
    everything: bool = False

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        kind = kind_of(format)
        if kind.bits != 4 or not kind.group or kind.scale != "f16":
            raise UserError(f"awq holds 4 bits in groups under f16 scales, not {format.name}; take uint4_g128, or "
                            "--to gptq, --to compressed-tensors")  # fmt: skip
        if shape[0] % 8:
            raise UserError(f"awq packs 8 rows in a word, and there are {shape[0]}; keep this weight")

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        w = integers_of(q)
        return {
            ".qweight": nibbles(np.ascontiguousarray(w.codes.T)),
            ".qzeros": nibbles(np.ascontiguousarray(w.zero.T)),
            ".scales": np.ascontiguousarray(w.scale.T),
        }

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        kind = kind_of(one_format(packed, self.name))
        said = {
            "quant_method": "awq", "bits": 4, "group_size": kind.group, "zero_point": not kind.symmetric,
            "version": "gemm", "modules_to_not_convert": list(floats),
        }  # fmt: skip
        return {"quantization_config": said}

    def reads(self, config: Settings) -> bool:
        return said_of(config).get("quant_method") == "awq"

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        said = said_of(config)
        number_of(checkpoint.path, said, "bits", (4,), 4)
        group = number_of(checkpoint.path, said, "group_size", range(1, 1 << 24))
        if str(said.get("version", "gemm")).lower() != "gemm":
            raise UserError(f"{checkpoint.path}: config.json: AWQ of version {said['version']!r} is not read; gemm is")
        kind = Kind(4, group, said.get("zero_point", True) is False, "f16")

        def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
            columns, eights = m.matrix(".qweight", "I32")
            m.shaped(".scales", "F16", (kind.groups(columns), 8 * eights))
            m.shaped(".qzeros", "I32", (kind.groups(columns), eights))
            return (8 * eights, columns), kind.format

        def put(m: Members, a: dict[str, np.ndarray]) -> QTensor:
            codes, zero = (np.ascontiguousarray(of_nibbles(a[key]).T) for key in (".qweight", ".qzeros"))
            if kind.symmetric and (zero != 8).any():
                raise UserError("config.json says no zero_point, and its zeros are not those of symmetric codes")
            return whole(kind, codes, np.ascontiguousarray(a[".scales"].T), None if kind.symmetric else zero).qtensor

        return joined(checkpoint, members(checkpoint, ".qweight", (".qzeros", ".scales")), shape_of, put)
