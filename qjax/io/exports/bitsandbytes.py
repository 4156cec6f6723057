"""bitsandbytes' 4-bit checkpoints, as transformers writes and reads them: NF4 or FP4, double quantization or not.

    weight u8[n / 2, 1]              codes of all rows one after the other, the first of two in the high nibble
    weight.absmax f32[n / block]     or u8, and weight.nested_absmax f32, weight.nested_quant_map f32[256]
    weight.quant_map f32[16]         the levels
    weight.quant_state.bitsandbytes__nf4    bytes of JSON: quant_type, blocksize, dtype, shape, nested_blocksize,
                                            nested_dtype, nested_offset

Blocks run on from row to row there; qjax reads and writes those that end with the row. Sources: QLoRA,
arXiv:2305.14314; bitsandbytes.functional.QuantState.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.formats import Format, find
from qjax.formats.codebook import LEVELS, codebook
from qjax.formats.dynamic_map import NESTED, dynamic_map
from qjax.io.exports.container import Members, Settings, joined, members, one_format, said_of
from qjax.io.safetensors import Checkpoint, Stored
from qjax.tensor import QTensor

_STATE = ".weight.quant_state.bitsandbytes__"
_NAME = re.compile(r"(NF4|FP4)(?:_b(\d+))?(_dq)?")


@dataclasses.dataclass(frozen=True)
class BitsAndBytes:
    """See the module's docstring."""

    name: str = "bitsandbytes"
    about: str = "transformers, PEFT: NF4 and FP4, blocks of 64 (_b32 to _b4096 others), double quantization (_dq)"
    everything: bool = False

    def check(self, format: Format, shape: tuple[int, ...]) -> None:
        _parts(format)

    def tensors(self, q: QTensor) -> dict[str, np.ndarray]:
        levels, block, double = _parts(q.format)
        if q.applied:
            raise UserError("the weight lies behind a change of variables, which the layer would have to run")
        a = {name: np.asarray(leaf) for name, leaf in q.leaves.items()}
        state: dict[str, Any] = {
            "quant_type": levels.lower(), "blocksize": block, "dtype": str(np.dtype(q.dtype)), "shape": list(q.shape),
        }  # fmt: skip
        made = {
            ".weight": a["codes"].reshape(-1, 1),
            ".weight.absmax": a["absmax"].reshape(-1),
            ".weight.quant_map": np.asarray(LEVELS[levels].values, np.float32),
        }
        if double:
            made[".weight.nested_absmax"] = a["nested_absmax"].reshape(-1)
            made[".weight.nested_quant_map"] = dynamic_map()
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": a["offset"].item()}
        made[_STATE + levels.lower()] = np.frombuffer(json.dumps(state).encode(), np.uint8)
        return made

    def settings(self, packed: Mapping[str, Format], floats: Sequence[str]) -> dict[str, Any]:
        levels, _, double = _parts(one_format(packed, self.name))
        said = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": levels.lower(), "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(floats) or None,
        }  # fmt: skip
        return {"quantization_config": said}

    def reads(self, config: Settings) -> bool:
        return said_of(config).get("quant_method") == "bitsandbytes"

    def open(self, config: Settings, checkpoint: Checkpoint) -> Checkpoint:
        if said_of(config).get("load_in_8bit"):
            raise UserError(f"{checkpoint.path}: config.json: LLM.int8() checkpoints are not read; 4-bit ones are")
        found = members(
            checkpoint, ".weight.absmax", (".weight", ".weight.quant_map"),
            (".weight.nested_absmax", ".weight.nested_quant_map", _STATE + "nf4", _STATE + "fp4"),
        )  # fmt: skip
        states = {module: _state(checkpoint, m) for module, m in found.items()}

        def shape_of(m: Members) -> tuple[tuple[int, ...], Format]:
            shape, format, _ = states[m.module]
            n = shape[0] * shape[1]
            block = _parts(format)[1]
            m.shaped(".weight", "U8", (n // 2, 1))
            m.shaped(".weight.quant_map", "F32", (16,))
            double = ".weight.nested_absmax" in m.tensors
            m.shaped(".weight.absmax", "U8" if double else "F32", (n // block,))
            if double:
                m.shaped(".weight.nested_absmax", "F32", (-(-n // block // NESTED),))
            return shape, format

        def put(m: Members, a: dict[str, np.ndarray]) -> QTensor:
            return _put(*states[m.module], a)

        return joined(checkpoint, found, shape_of, put)


def _parts(format: Format) -> tuple[str, int, bool]:
    """Levels, block and whether absmaxes are quantized too. Raises UserError for any other format."""
    found = _NAME.fullmatch(format.name)
    if found is None or find(format.name) != format:
        raise UserError(f"bitsandbytes has no place for {format.name}; take NF4, NF4_dq, FP4 or one of other blocks, "
                        "NF4_b128_dq")  # fmt: skip
    return found[1], int(found[2] or 64), bool(found[3])


def _state(checkpoint: Checkpoint, m: Members) -> tuple[tuple[int, ...], Format, float]:
    """Shape, format and offset of a weight, from its JSON."""
    stored = [s for s in m.tensors if s.startswith(_STATE)]
    if len(stored) != 1:
        raise UserError(f"{checkpoint.path}: {m.module!r} has {len(stored)} tensors {_STATE[1:]}*; expected one")
    name = m.module + stored[0]
    where = f"{checkpoint.path}: tensor {name!r}"
    entry: Stored = m.shaped(stored[0], "U8")
    if entry.nbytes > 1 << 16:
        raise UserError(f"{where} is {entry.nbytes} bytes of JSON; expected a few hundred")
    try:
        said = json.loads(m.array(stored[0]).tobytes())
        shape = tuple(map(int, said["shape"]))
        double = ".weight.nested_absmax" in m.tensors
        format = codebook(stored[0].removeprefix(_STATE).upper(), int(said["blocksize"]), double)
        offset = float(said["nested_offset"]) if double else 0.0
        nested = int(said["nested_blocksize"]) if double else NESTED
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(f"{where} is no state of a 4-bit weight: {e!r}") from None
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    if len(shape) != 2 or min(shape) < 1 or shape[1] % format.block or nested != NESTED:
        raise UserError(f"{where}: shape {list(shape)} in blocks of {format.block}, nested blocks of {nested}, is not "
                        f"read: rows have to end with a block, nested blocks are {NESTED}")  # fmt: skip
    return shape, format, offset


def _put(shape: tuple[int, ...], format: Format, offset: float, a: dict[str, np.ndarray]) -> QTensor:
    levels, block, double = _parts(format)
    if (a[".weight.quant_map"] != np.asarray(LEVELS[levels].values, np.float32)).any():
        raise UserError(f"its quant_map is not that of {levels}")
    out, blocks = shape[0], shape[1] // block
    leaves = {
        "codes": a[".weight"].reshape(out, blocks, block // 2),
        "absmax": a[".weight.absmax"].reshape(out, blocks),
    }
    if double:
        if (a[".weight.nested_quant_map"] != dynamic_map()).any():
            raise UserError("its nested_quant_map is not bitsandbytes' dynamic map")
        leaves |= {"nested_absmax": a[".weight.nested_absmax"][None], "offset": np.full((1, 1), offset, np.float32)}
    if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
        raise UserError("its absmaxes have NaN or infinite values; the file is broken")
    return QTensor(leaves, format)
