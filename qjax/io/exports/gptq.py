"""GPTQ checkpoints, as AutoGPTQ began them and GPTQModel, vLLM and transformers read them: 2, 3, 4 or 8 bits.

    qweight i32[in b / 32, out]    codes, a little-endian bit stream down the rows      g_idx i32[in]: a column's group
    qzeros  i32[G, out b / 32]     zeros along `out`:  z - 1 in "gptq", z in "gptq_v2"
    scales  f16[G, out]            W = s (q - z)

A zero of 0 has no form in the first (z - 1 would be -1). Groups are consecutive columns; where g_idx says otherwise
(act-order), the weight is read behind the permutation that makes them so, and such a weight is written back with it.
Sources: GPTQ, arXiv:2210.17323; the layouts of AutoGPTQ and GPTQModel.
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
from qjax.reparam.permute import Permuted
from qjax.tensor import QTensor

BITS = (2, 3, 4, 8)
_WORD = 32


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """See the module's docstring."""

    name: str
    about: str
    less: int  # what is taken from a zero
    everything: bool = False

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        kind = kind_of(format)
        if kind.bits not in BITS or kind.scale != "f16":
            raise UserError(
                f"{self.name} holds 2, 3, 4 or 8 bits under f16 scales, not {format.name}; take uint4_g128, int8_g128 "
                "..., or --to compressed-tensors"
            )
        for side, size in zip(("rows", "columns"), shape, strict=True):
            if size * kind.bits % _WORD:
                raise UserError(f"{self.name} packs {side} in words of 32 bits, which {size} codes of {kind.bits} bits "
                                "do not fill; keep this weight")  # fmt: skip

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        order, q = _order(q)
        w = integers_of(q)
        if self.less and (w.zero == 0).any():
            raise UserError("a zero of 0 has no form in gptq, which stores zeros less 1; --to gptq_v2 has it")
        codes, zero = w.codes, (w.zero - np.uint8(self.less)) & np.uint8(2**w.kind.bits - 1)
        columns, groups = codes.shape[-1], w.scale.shape[-1]
        g_idx = (np.arange(columns) // (columns // groups)).astype(np.int32)
        if order is not None:
            back = np.argsort(order)
            codes, g_idx = codes[:, back], g_idx[back]
        return {
            ".qweight": np.ascontiguousarray(words(codes, w.kind.bits).T),
            ".qzeros": words(zero.T, w.kind.bits),
            ".scales": np.ascontiguousarray(w.scale.T),
            ".g_idx": g_idx,
        }

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        kind = kind_of(one_format(packed, self.name))
        said = {
            "quant_method": "gptq", "checkpoint_format": self.name, "bits": kind.bits, "group_size": kind.group or -1,
            "sym": kind.symmetric, "desc_act": False, "lm_head": False, "pack_dtype": "int32",
        }  # fmt: skip
        inside = [m for m in floats if m != "lm_head"]
        if inside:  # how to leave modules out: transformers' way, and that of GPTQModel and vLLM
            said["modules_in_block_to_quantize"] = [sorted(packed)]
            said["dynamic"] = {f"-:^{m.replace('.', chr(92) + '.')}$": {} for m in inside}
        return {"quantization_config": said}

    def reads(self, config: Settings) -> bool:
        said = said_of(config)
        return said.get("quant_method") == "gptq" and said.get("checkpoint_format", "gptq") == self.name

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        said = said_of(config)
        symmetric = said.get("sym", True)
        if not isinstance(symmetric, bool):
            raise UserError(f"{checkpoint.path}: config.json: GPTQ of sym = {symmetric!r}; expected true or false")
        bits, group = (
            number_of(checkpoint.path, said, "bits", BITS),
            number_of(checkpoint.path, said, "group_size", range(-1, 1 << 24)),
        )
        kind = Kind(bits, max(group, 0), symmetric, "f16")

        def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
            height, out = m.matrix(".qweight", "I32")
            columns = height * _WORD // bits
            groups = kind.groups(columns)
            m.shaped(".scales", "F16", (groups, out))
            m.shaped(".qzeros", "I32", (groups, out * bits // _WORD))
            if ".g_idx" in m.tensors:
                m.shaped(".g_idx", "I32", (columns,))
            return (out, columns), kind.format

        found = members(checkpoint, ".qweight", (".qzeros", ".scales"), (".g_idx",))
        return joined(checkpoint, found, shape_of, lambda m, a: self._put(kind, a))

    def _put(self, kind: Kind, a: dict[str, np.ndarray]) -> QTensor:
        out, columns = a[".qweight"].shape[1], a[".qweight"].shape[0] * _WORD // kind.bits
        codes = codes_of(a[".qweight"].T, kind.bits, columns)
        zero = codes_of(a[".qzeros"], kind.bits, out)
        if self.less and (zero == 2**kind.bits - 1).any():
            raise UserError("a zero is stored as -1, which readers take for 2^bits; the file is broken")
        zero = zero + np.uint8(self.less)
        order = _sorted(a.get(".g_idx"), kind.groups(columns), columns)
        codes = codes if order is None else codes[:, order]
        if kind.symmetric and (zero != 2 ** (kind.bits - 1)).any():
            raise UserError("config.json says sym, and its zeros are not those of symmetric codes")
        q = whole(kind, codes, np.ascontiguousarray(a[".scales"].T), None if kind.symmetric else zero.T).qtensor
        return q if order is None else dataclasses.replace(q, applied=(Permuted(order),))


def _order(q: QTensor) -> tuple[np.ndarray | None, QTensor]:
    """The one change of variables that g_idx can say, and the weight behind it."""
    if len(q.applied) == 1 and isinstance(q.applied[0], Permuted):
        return np.asarray(q.applied[0].order), dataclasses.replace(q, applied=())
    return None, q


def _sorted(g_idx: np.ndarray | None, groups: int, columns: int) -> np.ndarray | None:
    """The order in which groups are consecutive columns; None where they are."""
    if g_idx is None or (g_idx == np.arange(columns) // (columns // groups)).all():
        return None
    if (np.bincount(np.clip(g_idx, 0, groups), minlength=groups)[:groups] != columns // groups).any():
        raise UserError("its g_idx gives the groups different numbers of columns; the file is broken")
    return np.argsort(g_idx, kind="stable").astype(np.int32)


V1 = GPTQ("gptq", "GPTQModel, vLLM, transformers: 2, 3, 4, 8 bits of int or uint, f16 scales, any group or row", 1)
V2 = GPTQ("gptq_v2", "GPTQModel: the same, a zero of 0 too", 0)
