"""FP8 in blocks, as DeepSeek-V3 and others publish it; read only.

    weight f8[out, in]        weight_scale_inv f32[ceil(out / 128), in / 128]        W = scale_inv float(code)

Each row of a block gets the block's scale as its own: the format FP8_E4M3_b128, the same values. Source: DeepSeek-V3,
arXiv:2412.19437, section 3.3.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format
from qjax.io.exports import fp8
from qjax.io.exports.container import Members, Settings, joined, members, said_of
from qjax.io.safetensors import Checkpoint
from qjax.tensor import QTensor


@dataclasses.dataclass(frozen=True)
class FP8Blocks:
    """See the module's docstring."""

    name: str = "fp8"

    def reads(self, config: Settings) -> bool:
        return said_of(config).get("quant_method") == "fp8"

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        size = said_of(config).get("weight_block_size")
        if size != [fp8.BLOCK, fp8.BLOCK]:
            raise UserError(
                f"{checkpoint.path}: config.json: FP8 in blocks of {size} is not read; [{fp8.BLOCK}, {fp8.BLOCK}] is"
            )

        def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
            out, columns = m.matrix(".weight", "F8_E4M3")
            if columns % fp8.BLOCK:
                raise UserError(
                    f"{m.tensors['.weight'].path}: tensor {m.module + '.weight'!r} has rows of {columns} weights, no "
                    f"multiple of {fp8.BLOCK}"
                )
            m.shaped(".weight_scale_inv", ("F32", "BF16"), (-(-out // fp8.BLOCK), columns // fp8.BLOCK))
            return (out, columns), fp8.block_format()

        def put(m: Members, a: dict[str, np.ndarray]) -> QTensor:
            return fp8.of_blocks(a[".weight"], a[".weight_scale_inv"])

        return joined(checkpoint, members(checkpoint, ".weight_scale_inv", (".weight",)), shape_of, put)
